"""A browser with the page, connected to `longvideo serve` with tiny, and what users do and see on it."""

from __future__ import annotations

import base64
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.infer.server.conftest import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required"
).split()
DEADLINE = 90.0  # seconds; other processes may use the same cores
TOKEN = "right-and-long-enough"
RED = "a large red circle drifts left over a black background"


class Cable:
    """A TCP proxy whose connections can be cut. Its port forwards to the port of the server."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all open connections; new ones work."""
        ends, self._ends = self._ends, []
        for end in ends:
            with closing(end):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:  # closed by the other side
                    continue

    def close(self) -> None:
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:  # closed
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._ends += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=_forward, args=(source, target), daemon=True).start()


def _forward(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # cut
        return


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = ServerProcess(tmp_path_factory.mktemp("served"))
    yield server
    server.stop()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Return a function that starts servers for one test; they share a folder and are stopped after it."""
    servers: list[ServerProcess] = []

    def serve(**settings: Any) -> ServerProcess:
        servers.append(ServerProcess(tmp_path, **settings))
        return servers[-1]

    yield serve
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'longvideo[test]'")
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: ServerProcess) -> Iterator[Page]:
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if "Security Policy" in line.text else None)
    open_page(page, server.url)
    yield page
    assert not problems


def open_page(page: Page, url: str) -> None:
    page.goto(url)
    wait(page, lambda: page.text_content("#status") == "Ready")


def wait(page: Page, condition: Callable[[], Any]) -> None:
    """Poll a condition. Playwright's own wait evaluates strings as code, which the page's policy forbids."""
    until = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > until:
            texts = {name: page.text_content(name) for name in ("#status", "#notices", "#prompt-problem", "#log")}
            raise AssertionError(f"the condition does not hold after {DEADLINE} s; the page shows {texts}")
        page.wait_for_timeout(50)


def start(page: Page, prompt: str, **settings: str) -> None:
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


def played(page: Page) -> float:
    return page.evaluate("document.querySelector('#video').currentTime")


def state(page: Page) -> str:
    return page.evaluate("document.body.dataset.state")


def num_chunks(page: Page) -> int:
    return page.locator("#chunks button").count()


def picture(page: Page, seconds: float | None = None) -> np.ndarray:
    """Return the frame that the video element shows, uint8 [H, W, 3]. seconds: position to seek to first."""
    pixels, height, width = page.evaluate(
        """async (seconds) => {
            const video = document.querySelector("#video");
            if (seconds !== null) {
                const seeked = new Promise((done) => video.addEventListener("seeked", done, { once: true }));
                video.currentTime = seconds;
                await seeked;
            }
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
            const drawing = canvas.getContext("2d", { willReadFrequently: true });
            drawing.drawImage(video, 0, 0);
            const { data } = drawing.getImageData(0, 0, canvas.width, canvas.height);
            let text = "";
            for (const value of data) text += String.fromCharCode(value);
            return [btoa(text), canvas.height, canvas.width];
        }""",
        seconds,
    )
    return np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(height, width, 4)[..., :3]
