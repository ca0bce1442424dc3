"""A server with a small random model on a loopback port, and clients that speak its protocol."""

from __future__ import annotations

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.connections import Waiting
from longvideo.infer.server.limits import Limits, ServerSettings
from longvideo.infer.server.run import VideoServer, listen
from longvideo.infer.server.served_folder import served_folder
from longvideo.infer.server.stream import Streams

DEADLINE = 30.0
START_SECONDS = 90.0  # other processes may use the same cores
PROMPT = "a red ball bounces"


@dataclass
class Client:
    """One WebSocket; keeps the segments it got."""

    socket: ClientConnection
    segments: list[bytes] = field(default_factory=list)
    init: bytes = b""

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def hear(self) -> dict[str, Any]:
        """Return the next message; the binary one that belongs to it is kept."""
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

    def hear_until(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Return all messages up to one of a type and with these fields."""
        messages = []
        while not messages or messages[-1]["type"] != kind or any(messages[-1][key] != fields[key] for key in fields):
            messages.append(self.hear())
        return messages

    def start(self, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
        self.say("start", prompt=prompt, **fields)
        return self.hear()


@dataclass
class RunningServer:
    """A server in a thread."""

    address: str
    folder: Path
    streams: Streams
    waiting: Waiting
    count_connections: Callable[[], int]
    stop: Callable[[], None]
    clients: ExitStack

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=DEADLINE, **options)

    def connect(self, **options: Any) -> Client:
        """Return a client whose connection is closed at the end."""
        options = {"max_size": None, "compression": None, **options}
        return Client(self.clients.enter_context(connect(f"ws://{self.address}/v1/stream", **options)))

    def connect_idle(self) -> Client:
        """Return a client with room for next to nothing, which takes what it gets only when told to `hear`."""
        host, _, port = self.address.partition(":")
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.connect((host, int(port)))
        return self.connect(sock=narrow, max_queue=1)


def wait_until(holds: Callable[[], bool]) -> None:
    """Poll until something holds; fail after the deadline."""
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


Serve = Callable[..., RunningServer]


@pytest.fixture
def serve(pipeline: StreamingPipeline, tmp_path: Path) -> Iterator[Serve]:
    """Start servers; `limits` and settings by name. They are stopped at the end, and leave no thread."""
    stops: list[Callable[[], None]] = []
    clients = ExitStack()
    before = set(threading.enumerate())
    mask = os.umask(0o022)

    def start(
        *, limits: Limits | None = None, folder: Path = tmp_path, send_buffer: int | None = None, **settings: Any
    ) -> RunningServer:
        listening = listen("127.0.0.1", 0)
        if send_buffer is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        held = ExitStack()
        held.enter_context(served_folder(folder))
        server = VideoServer(pipeline, ServerSettings(folder, "small", limits=limits or Limits(), **settings))
        thread = threading.Thread(target=server.run, args=([listening],), name="uvicorn")
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(DEADLINE)
            assert not thread.is_alive(), "the server did not end"
            held.close()

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
    os.umask(mask)  # servers that ran at a time did not end in the order that restores it
    wait_until(lambda: not {thread for thread in set(threading.enumerate()) - before if thread.is_alive()})


class ServerProcess:
    """`longvideo serve` with tiny on the CPU, in a process of its own."""

    def __init__(self, folder: Path, *, port: int = 0, token: str | None = None) -> None:
        command = [sys.executable, "-c", "from longvideo.cli.main import main; main()", "serve", "--device", "cpu"]
        command += ["--port", str(port), "--folder", str(folder), "--max-sessions", "4"]
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
    model_folder: Path, place: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Run `longvideo serve` on a free port in a process of its own, whose working folder is `place`."""
    command = [sys.executable, "-m", "longvideo.cli.main", "serve", "--model", str(model_folder), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--port", "0", *options], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        with httpx.Client(base_url=line.split()[-1], timeout=DEADLINE) as http:
            yield process, http
    finally:
        process.kill()
        process.communicate()
