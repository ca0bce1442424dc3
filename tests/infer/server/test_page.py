"""The page in a browser, connected to `longvideo serve` with tiny: what users do and see."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from longvideo.evaluation.judge import judge
from longvideo.evaluation.request import read_caption
from longvideo.evaluation.sheet import write_animation, write_picture
from tests.infer.server.conftest import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required"
).split()
DEADLINE = 90.0  # seconds; other processes may use the same cores
GIF_FPS = 6
MAX_GIF_BYTES = 600_000
TOKEN = "right-and-long-enough"
STAR = "a small yellow star spins on a meadow"
NIGHT = "at night, a red star falls while a cyan ring flies to the left"
RED = "a large red circle drifts left over a black background"
BLUE = "a large blue circle drifts left over a black background"


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


def record(page: Page, frames: list[np.ndarray], *, count: int = 1) -> None:
    """Append `count` copies of a screenshot, uint8 [H, W, 3]."""
    frames += [iio.imread(page.screenshot(), extension=".png")[..., :3]] * count


def type_prompt(page: Page, prompt: str, frames: list[np.ndarray]) -> None:
    """Type a prompt key by key and send it; record a frame for every third key, and some before Enter."""
    page.fill("#prompt", "")
    page.focus("#prompt")
    for begin in range(0, len(prompt), 3):
        page.keyboard.type(prompt[begin : begin + 3])
        record(page, frames)
    record(page, frames, count=4)
    page.keyboard.press("Enter")


def record_playback(page: Page, frames: list[np.ndarray], until: Callable[[], bool]) -> None:
    """Record a frame for every 1 / GIF_FPS seconds of the video until a condition holds."""
    position = played(page)
    while not until():
        position += 1 / GIF_FPS
        wait(page, lambda target=position: played(page) >= target)
        record(page, frames)


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


def presentation_times(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        times = [frame.pts for frame in container.decode(video=0)]
    assert None not in times
    return [time for time in times if time is not None]


def test_the_video_plays_while_it_is_generated(page: Page) -> None:
    began = time.perf_counter()
    page.reload()
    wait(page, lambda: page.text_content("#status") == "Ready")
    start(page, RED)
    wait(page, lambda: played(page) > 0.1)
    print(f"from opening the page to a moving picture: {time.perf_counter() - began:.2f} s")
    before, position = picture(page), played(page)
    wait(page, lambda: played(page) > position + 0.8)
    assert state(page) == "playing"
    assert np.abs(picture(page).astype(int) - before).max() > 50
    assert page.text_content("#stat-first") != "–"


@pytest.mark.slow
def test_a_prompt_change_is_shown_from_the_chunk_of_its_receipt(page: Page) -> None:
    start(page, RED, seconds="13")
    wait(page, lambda: num_chunks(page) >= 2)
    page.fill("#prompt", BLUE)
    page.press("#prompt", "Enter")
    wait(page, lambda: page.locator("#log li").count() == 1)
    text = page.text_content("#log .log-times") or ""
    match = re.fullmatch(r"cut: accepted at chunk (\d+), shown from chunk (\d+) \((\d+\.\d) s\)", text)
    assert match, text
    chunk, second = int(match[2]), float(match[3])
    wait(page, lambda: page.text_content("#log .log-state") == "now showing")
    assert played(page) >= second - 0.1
    wait(page, lambda: page.evaluate("document.querySelector('#video').ended"))
    prompts = page.eval_on_selector_all("#chunks button", "all => all.map((one) => one.title.replace(/^.*?: /, ''))")
    assert prompts == [RED] * chunk + [BLUE] * (len(prompts) - chunk)

    fps = 8
    for prompt, begin, end in ((RED, 0.0, second), (BLUE, second + 0.1, 13.0)):
        times = np.arange(begin, min(end, begin + 4) - 0.1, 1 / fps)
        frames = np.stack([picture(page, time + 0.02) for time in times])
        verdict = judge(frames, read_caption(prompt), fps=fps)
        assert verdict.color and verdict.shape and verdict.background, (prompt, verdict)


def test_a_branch_replaces_later_chunks(page: Page) -> None:
    start(page, RED)
    wait(page, lambda: num_chunks(page) >= 4)
    page.click("#pause")
    page.focus("#chunks button[tabindex='0']")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert "Chunk 1," in (page.text_content("#branch-text") or "")
    page.fill("#prompt", BLUE)
    page.click("#branch-new")
    wait(page, lambda: page.text_content("#log .log-state") == "now showing")
    assert "branch: " in (page.text_content("#log .log-times") or "")
    titles = page.eval_on_selector_all("#chunks button", "all => all.map((one) => one.title)")
    assert RED in titles[0] and BLUE in titles[1]
    wait(page, lambda: played(page) > 1.4)
    red, _, blue = picture(page).reshape(-1, 3).astype(int)[picture(page).max(2).ravel() > 90].mean(0)
    assert blue > red


def test_a_shot_can_be_planned(page: Page) -> None:
    start(page, RED)
    wait(page, lambda: num_chunks(page) >= 1)
    page.fill("#start-time", "30")
    assert page.text_content("#start-chunk") == "chunk 23"
    start(page, BLUE)
    wait(page, lambda: page.locator(".planned").count() == 1)
    assert page.get_attribute(".planned", "title") == f"Planned from chunk 23, 30.5 s: {BLUE}"
    assert page.input_value("#start-time") == ""


def test_a_lost_connection_is_restored(page: Page, server: ServerProcess) -> None:
    cable = Cable(server.port)
    open_page(page, cable.url)
    start(page, RED)
    wait(page, lambda: num_chunks(page) >= 2)
    cable.cut()
    wait(page, lambda: "connection is lost" in (page.text_content("#notices") or ""))
    before = num_chunks(page)
    wait(page, lambda: state(page) == "playing")
    assert page.text_content("#notices") == ""
    wait(page, lambda: num_chunks(page) >= before + 2)
    buffered_end = page.evaluate("document.querySelector('#video').buffered.end(0)")
    wait(page, lambda: played(page) > buffered_end - 1)
    cable.close()


@pytest.mark.slow
def test_a_restarted_server_continues_the_video(page: Page, serve: Callable[..., ServerProcess]) -> None:
    server = serve()
    open_page(page, server.url)
    start(page, RED)
    wait(page, lambda: num_chunks(page) >= 2)
    server.stop()
    wait(page, lambda: state(page) == "lost")
    before = num_chunks(page)
    serve(port=server.port)
    wait(page, lambda: state(page) == "playing" and num_chunks(page) >= before + 2)


def test_a_negative_prompt_is_asked_for_where_the_model_has_guidance(
    context: BrowserContext, page: Page, tmp_path: Path
) -> None:
    assert page.is_hidden("#negative-field")  # tiny runs without guidance
    guided = ServerProcess(tmp_path, model="tiny-teacher")
    try:
        other = context.new_page()
        open_page(other, guided.url)
        sent: list[dict[str, Any]] = []
        other.on("websocket", lambda socket: socket.on("framesent", lambda text: sent.append(json.loads(text))))
        other.fill("#negative-prompt", " a blue star ")
        start(other, RED)
        wait(other, lambda: sent)
        assert (sent[0]["type"], sent[0]["prompt"], sent[0]["negative_prompt"]) == ("start", RED, "a blue star")
        wait(other, lambda: state(other) == "playing")
    finally:
        guided.stop()


def test_problems_of_a_prompt_are_shown(page: Page) -> None:
    page.press("#prompt", "Enter")
    assert page.text_content("#prompt-problem") == "Describe the video."
    assert page.get_attribute("#prompt", "aria-invalid") == "true"
    start(page, "red " * 600)
    wait(page, lambda: "The prompt was rejected." in (page.text_content("#prompt-problem") or ""))
    assert state(page) == "idle"
    start(page, "a large red zebra")
    wait(page, lambda: "zebra" in (page.text_content(".notice.warning") or ""))


def test_an_unreachable_server_is_reported(page: Page, serve: Callable[..., ServerProcess]) -> None:
    server = serve()
    open_page(page, server.url)
    server.stop()
    start(page, RED)
    wait(page, lambda: "The server cannot be reached." in (page.text_content(".notice.error") or ""))
    assert state(page) == "idle"


def test_a_required_token_is_requested_and_sent(
    page: Page, serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    server = serve(token=TOKEN)
    open_page(page, server.url)
    start(page, RED, token="wrong-but-long-enough")
    wait(page, lambda: "The server rejected the token." in (page.text_content(".notice.error") or ""))
    start(page, RED, token=TOKEN, seconds="2")
    wait(page, lambda: state(page) == "ended")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "video.mp4")
    assert len(presentation_times(tmp_path / "video.mp4")) == 48


def test_the_download_plays(page: Page, tmp_path: Path) -> None:
    start(page, RED)
    wait(page, lambda: num_chunks(page) >= 2)
    page.click("#stop")
    wait(page, lambda: state(page) == "ended")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "video.mp4")
    times = presentation_times(tmp_path / "video.mp4")
    assert len(times) >= 29 + 32
    assert all(earlier < later for earlier, later in zip(times, times[1:], strict=False))


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_the_width_of_the_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    start(page, RED)
    wait(page, lambda: num_chunks(page) >= 3)
    page.click("#chunks button >> nth=1")
    assert page.is_visible("#branch-same")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_keyboard_is_sufficient(page: Page) -> None:
    for _ in range(4):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "prompt":
            break
    page.keyboard.type(RED)
    page.keyboard.press("Enter")
    wait(page, lambda: num_chunks(page) >= 1 and played(page) > 0)
    while page.evaluate("document.activeElement.id") != "pause":
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    assert state(page) == "paused"
    assert page.text_content("#pause") == "Resume"


def test_all_controls_have_accessible_names(page: Page) -> None:
    start(page, RED)
    wait(page, lambda: num_chunks(page) >= 2)
    page.click("#chunks button >> nth=0")
    unnamed = page.eval_on_selector_all(
        "input, textarea, button, a, svg, video",
        """all => all.filter((one) => {
            const hasName = one.getAttribute("aria-label") || one.labels?.length;
            return !hasName && !one.textContent.trim();
        }).map((one) => one.outerHTML)""",
    )
    assert unnamed == []
    ids = page.eval_on_selector_all("[id]", "all => all.map((one) => one.id)")
    assert len(ids) == len(set(ids))
    references = page.eval_on_selector_all(
        "[aria-labelledby], [aria-describedby]",
        "all => all.flatMap((one) => [one.getAttribute('aria-labelledby'), one.getAttribute('aria-describedby')])",
    )
    assert {name for name in references if name} <= set(ids)
    assert page.get_attribute("#status", "role") == "status"


@pytest.mark.parametrize(("name", "width", "height"), [("page", 1200, 1180), ("page_narrow", 360, 740)])
def test_pictures_of_the_page(
    browser: Browser, server: ServerProcess, picture_folder: Path, name: str, width: int, height: int
) -> None:
    with closing(browser.new_context(viewport={"width": width, "height": height})) as context:
        page = context.new_page()
        open_page(page, server.url)
        start(page, RED)
        wait(page, lambda: played(page) > 2)
        start(page, STAR)
        page.fill("#start-time", "24")
        start(page, NIGHT)
        wait(page, lambda: page.locator(".planned").count() == 1 and num_chunks(page) >= 9)
        page.fill("#prompt", "a yellow ring circles clockwise at night")
        wait(page, lambda: STAR in (page.text_content("#status") or ""))
        write_picture(Image.open(BytesIO(page.screenshot())), picture_folder / f"{name}.png")


def test_picture_of_a_steered_video(browser: Browser, server: ServerProcess, picture_folder: Path) -> None:
    """Record the page as a GIF: a prompt is typed, the video plays, another prompt is typed, the video changes.

    Frames are recorded at equal steps of the video's time, so the GIF plays at the speed of the video, and waiting for
    chunks is left out.
    """
    frames: list[np.ndarray] = []
    with closing(browser.new_context(viewport={"width": 800, "height": 822}, device_scale_factor=0.9)) as context:
        page = context.new_page()
        open_page(page, server.url)
        record(page, frames, count=4)
        type_prompt(page, RED, frames)
        wait(page, lambda: played(page) > 0)
        # a screenshot takes longer than a step of the video at full speed
        page.evaluate("document.querySelector('#video').playbackRate = 0.25")
        record_playback(page, frames, lambda: played(page) > 1.5)
        type_prompt(page, STAR, frames)
        record_playback(page, frames, lambda: page.text_content("#log .log-state") == "now showing")
        change = played(page)
        record_playback(page, frames, lambda: played(page) > change + 3)
    target = picture_folder / "steer.gif"
    write_animation(np.stack(frames), target, fps=GIF_FPS, source_fps=GIF_FPS)
    assert target.stat().st_size < MAX_GIF_BYTES
