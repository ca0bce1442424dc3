"""Servers on a loopback port, in threads with a small random model and in processes, and clients of their protocol."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.connections import WaitingConnections
from longvideo.infer.server.limits import Limits, ServerSettings
from longvideo.infer.server.run import VideoServer, listen
from longvideo.infer.server.served_folder import served_folder
from longvideo.infer.server.stream import Streams

DEADLINE = 30.0
START_SECONDS = 90.0  # other processes may use the same cores
PROMPT = "a red ball bounces"
FPS = 24


@dataclass
class Client:
    """A WebSocket client that keeps the segments it receives."""

    socket: ClientConnection
    segments: list[bytes] = field(default_factory=list)
    init: bytes = b""

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def receive(self) -> dict[str, Any]:
        """Return the next text message, and keep the binary message that follows it."""
        text = self.socket.recv(timeout=DEADLINE)
        assert isinstance(text, str)
        message = json.loads(text)
        if message["type"] in ("ready", "chunk"):
            data = self.socket.recv(timeout=DEADLINE)
            assert isinstance(data, bytes)
            if message["type"] == "ready":
                self.init = data
            else:
                assert len(data) == message["bytes"]
                self.segments.append(data)
        return message

    def receive_until(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Return all messages up to one with this type and these fields."""
        messages = []
        while not messages or messages[-1]["type"] != kind or any(messages[-1][key] != fields[key] for key in fields):
            messages.append(self.receive())
        return messages

    def start(self, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
        self.send("start", prompt=prompt, **fields)
        return self.receive()


@dataclass
class RunningServer:
    """A server in a thread of the test process."""

    address: str
    folder: Path
    streams: Streams
    waiting: WaitingConnections
    count_connections: Callable[[], int]
    stop: Callable[[], None]
    clients: ExitStack

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=DEADLINE, **options)

    def connect(self, **options: Any) -> Client:
        """Return a client whose connection is closed at the end of the test."""
        options = {"max_size": None, "compression": None, **options}
        return Client(self.clients.enter_context(connect(f"ws://{self.address}/v1/stream", **options)))

    def connect_idle(self) -> Client:
        """Return a client with a minimal buffer, which receives data only while `receive` runs."""
        host, _, port = self.address.partition(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        return self.connect(sock=connection, max_queue=1)


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until a condition holds; fail after DEADLINE seconds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"the condition does not hold after {DEADLINE} s"
        time.sleep(0.01)


Serve = Callable[..., RunningServer]


@pytest.fixture
def serve(pipeline: StreamingPipeline, tmp_path: Path) -> Iterator[Serve]:
    """Return a function that starts servers with `limits` and settings by name.

    After the test they are stopped, and none of their threads may remain.
    """
    stops: list[Callable[[], None]] = []
    clients = ExitStack()
    previous_threads = set(threading.enumerate())
    mask = os.umask(0o022)

    def start(
        *, limits: Limits | None = None, folder: Path = tmp_path, send_buffer: int | None = None, **settings: Any
    ) -> RunningServer:
        listening = listen("127.0.0.1", 0)
        if send_buffer is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        lock = ExitStack()
        lock.enter_context(served_folder(folder))
        server = VideoServer(pipeline, ServerSettings(folder, "small", limits=limits or Limits(), **settings))
        thread = threading.Thread(target=server.run, args=([listening],), name="uvicorn")
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(DEADLINE)
            assert not thread.is_alive(), "the server did not stop"
            lock.close()

        stops.append(stop)
        wait_until(lambda: server.started)
        return RunningServer(
            address=f"127.0.0.1:{listening.getsockname()[1]}",
            folder=folder,
            streams=server.app.state.streams,
            waiting=server.app.state.waiting,
            count_connections=lambda: len(server.server_state.connections),
            stop=stop,
            clients=clients,
        )

    with clients:
        yield start
    for stop in stops:
        stop()
    os.umask(mask)  # servers that ran at the same time may have restored each other's mask
    wait_until(lambda: not {thread for thread in set(threading.enumerate()) - previous_threads if thread.is_alive()})


class ServerProcess:
    """`longvideo serve` on the CPU, in a process of its own."""

    def __init__(self, folder: Path, *, port: int = 0, token: str | None = None, model: str = "tiny") -> None:
        command = [sys.executable, "-c", "from longvideo.cli.main import main; main()", "serve", "--device", "cpu"]
        command += ["--model", model, "--port", str(port), "--folder", str(folder), "--max-sessions", "4"]
        environment = os.environ | ({} if token is None else {"LONGVIDEO_TOKEN": token})
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        line = self._first_line()
        match = re.search(r"http://[\d.]+:(\d+)", line)
        assert match, f"longvideo serve printed {line!r}"
        self.url, self.port = match[0], int(match[1])

    def stop(self) -> None:
        """Stop it as Ctrl-C does. Stopping twice does nothing."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()

    def _first_line(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_SECONDS)
        return self.process.stdout.readline() if ready else ""


@contextmanager
def serve_process(
    model_folder: Path, cwd: Path, *options: str
) -> Generator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Run `longvideo serve` on a free port in a process of its own, with the working folder `cwd`."""
    command = [sys.executable, "-m", "longvideo.cli.main", "serve", "--model", str(model_folder), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--port", "0", *options], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        with httpx.Client(base_url=line.split()[-1], timeout=DEADLINE) as http:
            yield process, http
    finally:
        process.kill()
        process.communicate()


def decoded(data: bytes) -> tuple[list[int], np.ndarray]:
    """Return the number of each frame, from its time, and the frames of a video file [T, H, W, 3]."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    time_base = frames[0].time_base
    assert time_base is not None
    return [round(float(frame.pts * time_base) * FPS) for frame in frames], np.stack(
        [frame.to_ndarray(format="rgb24") for frame in frames]
    )


def closed_with(client: Client) -> int | None:
    """Read to the end of a connection and return its close code."""
    try:
        while True:
            client.socket.recv(timeout=30)
    except ConnectionClosed as error:
        return error.rcvd.code if error.rcvd else None
