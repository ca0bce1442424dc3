"""No step is lost when SIGTERM arrives at random moments of a training run.

`--soak N` sets the number of moments.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.options import option_value
from tests.train.small import Toy

STEPS = 4000
MOST_STEPS = 60  # until the signal comes


def start(out: Path) -> subprocess.Popen[str]:
    stages = f"stages=[{{frames: 5, height: 32, width: 32, batch: 2, steps: {STEPS}}}]"
    more = ("trainer.save_every=0", "trainer.log_every=1")
    command = [sys.executable, "-m", "longvideo", "train", "vae", "tiny/vae", *Toy.vae, stages, *more]
    return subprocess.Popen(
        [*command, "--out", str(out), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.time_limit("--soak", 60)
def test_sigterm_loses_no_step(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    lottery, done = random.Random(0), 0
    for _ in range(option_value(pytestconfig, "--soak")):
        process = start(tmp_path / "run")
        assert process.stdout is not None
        left, last = lottery.randint(1, MOST_STEPS), done
        for line in process.stdout:
            match = re.match(r"step (\d+)/", line)
            if started := re.match(r"(?:starting|resuming) at step (\d+) ", line):
                assert int(started[1]) == done
            elif match:
                last, left = int(match[1]), left - 1
                if left == 0:
                    process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        (newest,) = [max((tmp_path / "run" / "checkpoints").glob("step_*"))]
        done = int(newest.name.removeprefix("step_"))
        assert done == last
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, done + 1))
