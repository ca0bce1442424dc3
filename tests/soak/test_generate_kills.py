"""After `longvideo generate --overwrite` is killed, either the older video plays or everything that was reported.

`--soak N` sets the number of random moments.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.writer import VideoWriter
from tests.folders import file_names
from tests.options import option_value

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
OLD_FRAMES = 7
SECONDS = 20


def playable(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "longvideo.cli.main", "generate", "a red ball", "--seconds", str(SECONDS)]
    return subprocess.Popen(
        [*command, "--model", str(folder), "--device", "cpu", "--overwrite", "-o", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in SIGNALS[1:]],
    )


def end(process: subprocess.Popen[str], number: int, *, lines: int | None, delay: float) -> list[str]:
    """Send a signal after `delay` seconds, or after a number of reports; return all reports."""
    assert process.stderr is not None
    reports = []
    while lines is not None and len(reports) < lines and (line := process.stderr.readline()):
        reports.append(line)
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    reports += process.stderr.readlines()
    process.wait()
    return [line for line in reports if line.startswith("chunk")]


@pytest.mark.slow
@pytest.mark.time_limit("--soak", 60)
def test_an_older_film_or_what_was_reported_plays(
    model_folder: Path,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    out, lottery = tmp_path / "film.mp4", random.Random(0)
    timing = StreamingPipeline.from_pretrained(model_folder, device="cpu").chunk_timing
    began = time.monotonic()
    start(model_folder, out).communicate()
    whole_run = time.monotonic() - began
    new = 0
    for moment in range(option_value(pytestconfig, "--soak")):
        with VideoWriter(out, fps=24, overwrite=True) as writer:
            writer.write(np.zeros((OLD_FRAMES, 32, 64, 3), np.uint8))
        lines = None if moment % 2 else lottery.choice((1, 1, 2, 5))
        delay = lottery.uniform(0, whole_run if lines is None else 0.2)
        number = SIGNALS[moment % len(SIGNALS)]
        reports = end(start(model_folder, out), number, lines=lines, delay=delay)
        parts = len(reports)
        reported = 0 if parts == 0 else 1 if parts == 1 else min(timing.start(parts - 1), SECONDS * 24)
        frames = playable(out)
        print(f"{number.name} after {parts} reports: {reported} frames reported, {frames} play")
        assert frames >= reported
        assert parts > 0 or frames in (OLD_FRAMES, 1)  # the first frame may play before it is reported
        new += parts > 0
    assert new > 0
    start(model_folder, out).communicate()
    assert playable(out) == SECONDS * 24 and file_names(tmp_path) == [out.name]
