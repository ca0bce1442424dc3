"""`longvideo serve` with tiny for a long stream and for many clients: memory is constant and the file is complete.

--stream-seconds sets the length of the video, --stream-clients the number of clients.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from socket import SHUT_RDWR

import av
import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from longvideo.infer.history import HISTORY_CHUNKS
from tests.infer.server.conftest import Client, ServerProcess, wait_until
from tests.options import option_value

SETTLED_CHUNKS = 6
SWITCH_CHUNKS = 20  # number of chunks between two prompts, and for which a peak is measured
SETTLED_CLIENTS = 4
GROWTH = 1.05
PROMPTS = ("a small red circle drifts left over a black background", "a large blue star spins on a meadow")


def resident_bytes(process: int) -> int:
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(process: int) -> int:
    """Return the peak memory of a process since the previous call, and reset the peak."""
    match = re.search(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    Path(f"/proc/{process}/clear_refs").write_text("5")
    assert match
    return int(match[1]) * 1024


def open_files(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")


def live_streams(server: ServerProcess) -> int:
    match = re.search(r"^longvideo_sessions_live (\d+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert match
    return int(match[1])


@pytest.mark.slow
@pytest.mark.time_limit("--stream-clients", 10)
def test_memory_and_files_are_released_when_clients_disconnect(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    num_clients = option_value(pytestconfig, "--stream-clients")
    server, chance = ServerProcess(tmp_path), random.Random(0)
    memory, files = [], []
    try:
        for _ in range(num_clients):
            with connect(server.url.replace("http", "ws") + "/v1/stream", max_size=None, compression=None) as socket:
                client = Client(socket)
                client.start(chance.choice(PROMPTS))
                for _ in range(chance.randrange(4)):
                    client.receive()
                if chance.random() < 0.5:
                    socket.socket.shutdown(SHUT_RDWR)
            wait_until(lambda: live_streams(server) == 0)
            memory.append(resident_bytes(server.process.pid))
            files.append(open_files(server.process.pid))
        # the connection of the last request to /metrics may still be open
        wait_until(lambda: open_files(server.process.pid) <= files[SETTLED_CLIENTS - 1])
    finally:
        server.stop()
    settled, end = memory[SETTLED_CLIENTS - 1], memory[-1]
    print(
        f"{num_clients} clients: {settled >> 20} MiB after {SETTLED_CLIENTS}, {end >> 20} MiB at the end; files {files}"
    )
    assert end < GROWTH * settled


@pytest.mark.slow
@pytest.mark.time_limit("--stream-seconds", 3)
def test_a_long_stream_needs_constant_memory(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    seconds = option_value(pytestconfig, "--stream-seconds")
    server = ServerProcess(tmp_path)
    try:
        with connect(server.url.replace("http", "ws") + "/v1/stream", max_size=None, compression=None) as socket:
            client = Client(socket)
            session = client.start(PROMPTS[0], seconds=seconds)["session"]
            peaks, files = [], []
            while (message := client.receive())["type"] != "end":
                if message["type"] != "chunk":
                    continue
                client.segments.clear()
                # the peak, because the current size depends on the progress of the next chunk
                peaks.append(peak_bytes(server.process.pid))
                files.append(open_files(server.process.pid))
                if message["chunk"] % SWITCH_CHUNKS == SWITCH_CHUNKS - 1:
                    client.send("set_prompt", prompt=PROMPTS[message["chunk"] // SWITCH_CHUNKS % 2], mode="cut")
    finally:
        server.stop()
    # before that, the window and the history for seeking are still growing
    first = min(HISTORY_CHUNKS + SETTLED_CHUNKS, len(peaks) // 2)
    later = first + min(SWITCH_CHUNKS, len(peaks) // 4)
    settled, peak = max(peaks[first:later]), max(peaks[later:])
    quarters = [(int(part.min()), int(part.max())) for part in np.array_split(np.array(peaks[later:]) >> 20, 4)]
    print(f"{seconds:g} s, {len(peaks)} parts: {settled >> 20} MiB peak in {first} to {later}; then {quarters}")
    assert peak < GROWTH * settled
    assert files[-1] <= files[first]
    with av.open(str(tmp_path / "streams" / f"{session}.mp4")) as container:
        times = [frame.pts for frame in container.decode(video=0)]
    assert len(times) == message["frames"] == round(seconds * 24)
    assert all(later > earlier for earlier, later in zip(times, times[1:], strict=False))
