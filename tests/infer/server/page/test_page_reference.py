"""A picture or a video that the next video starts from, on the page: chosen, dropped, pasted, uploaded and refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from longvideo.data.video import write_video
from longvideo.infer.server.limits import Limits
from tests.infer.server.conftest import ServerProcess
from tests.infer.server.page.conftest import RED, TOKEN, Cable, num_chunks, open_page, picture, start, state, wait

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

HEIGHT, WIDTH, FPS = 128, 224, 24
TWO_CHUNKS = 29 + 32
DISPATCH = """({ kind, name, type, data, text }) => {
    const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type }));
    if (text) transfer.setData("text/plain", text);
    const options = { bubbles: true, cancelable: true };
    const target = document.querySelector("#prompt");
    if (kind === "paste") {
        target.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
        return null;
    }
    const over = new DragEvent("dragover", { ...options, dataTransfer: transfer });
    target.dispatchEvent(over);
    const drop = new DragEvent("drop", { ...options, dataTransfer: transfer });
    target.dispatchEvent(drop);
    return over.defaultPrevented && drop.defaultPrevented;
}"""


def circle(left: int) -> Image.Image:
    """A picture of a red circle over a black background, as tiny was trained on."""
    image = Image.new("RGB", (WIDTH, HEIGHT))
    ImageDraw.Draw(image).ellipse((left, 34, left + 60, 94), fill=(220, 40, 40))
    return image


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with first.png, clip.mp4 of two chunks, and files that cannot be used."""
    folder = tmp_path_factory.mktemp("files")
    circle(20).save(folder / "first.png")
    frames = [torch.from_numpy(np.array(circle(index))) for index in range(TWO_CHUNKS)]
    write_video(folder / "clip.mp4", [torch.stack(frames)], fps=FPS)
    write_video(folder / "short.mp4", [torch.stack(frames[:20])], fps=FPS)
    (folder / "damaged.png").write_bytes((folder / "first.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no picture")
    with (folder / "large.png").open("wb") as large:
        large.truncate(Limits.upload_bytes + 2**20)
    return folder


def choose(page: Page, path: Path) -> None:
    page.set_input_files("#reference-file", path)


def problem(page: Page) -> str:
    return page.text_content("#reference-problem") or ""


def sent_messages(page: Page) -> list[dict[str, Any]]:
    """Return a list to which the messages of the page's WebSockets are appended."""
    messages: list[dict[str, Any]] = []
    page.on("websocket", lambda socket: socket.on("framesent", lambda text: messages.append(json.loads(text))))
    return messages


def test_a_video_starts_from_a_picture(page: Page, files: Path) -> None:
    messages = sent_messages(page)
    choose(page, files / "first.png")
    wait(page, lambda: page.evaluate("document.querySelector('#reference-picture').naturalWidth") == WIDTH)
    assert page.is_visible("#reference-picture") and page.is_hidden("#reference-video")
    assert (page.text_content("#reference-name") or "").startswith("first.png, ")
    start(page, RED, seconds="2")
    wait(page, lambda: state(page) == "ended" and page.evaluate("document.querySelector('#video').ended"))
    assert (messages[0]["type"], len(messages[0]["input_reference"])) == ("start", 22)
    reds = np.flatnonzero((picture(page, 0.0)[..., 0] > 128).any(0))
    assert abs(reds.min() - 20) <= 4 and abs(reds.max() - 80) <= 4  # the columns of the circle in the picture
    assert page.is_visible("#reference-picture")  # "Start again" uses it again
    page.click("#reference-remove")
    assert page.is_hidden("#reference-picture") and page.text_content("#reference-name") == ""
    assert page.evaluate("document.activeElement.id") == "reference-choose"
    count = len(messages)
    start(page, RED, seconds="1")
    wait(page, lambda: len(messages) > count)
    assert messages[count]["type"] == "start" and "input_reference" not in messages[count]


def test_all_warnings_of_a_start_are_shown(page: Page, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    choose(page, tmp_path / "noise.png")
    start(page, "a large red zebra")
    for part in ("'zebra'", "The picture comes back from the model's autoencoder"):
        wait(page, lambda part=part: part in (page.text_content(".notice.warning") or ""))
    page.click("#stop")
    wait(page, lambda: state(page) == "ended")


def test_a_continued_video_is_steered_and_survives_a_lost_connection(
    page: Page, server: ServerProcess, files: Path
) -> None:
    cable = Cable(server.port)
    open_page(page, cable.url)
    choose(page, files / "clip.mp4")
    wait(page, lambda: page.evaluate("document.querySelector('#reference-video').currentTime") > 2)  # its end
    start(page, RED)
    wait(page, lambda: num_chunks(page) >= 2)
    assert page.is_hidden("#reference-field")
    numbers = page.eval_on_selector_all("#chunks button", "all => all.map((one) => one.textContent)")
    assert numbers[:2] == ["2", "3"]
    assert "The chunks before 2 are your video." in (page.text_content("#timeline-hint") or "")
    assert "0.0 s" in (page.get_attribute("#chunks button", "title") or "")
    cable.cut()
    wait(page, lambda: state(page) == "lost")
    before = num_chunks(page)
    wait(page, lambda: state(page) == "playing" and num_chunks(page) > before)
    page.click("#chunks button >> nth=1")
    assert "Chunk 3, from 1.3 s" in (page.text_content("#branch-text") or "")
    page.fill("#prompt", "a large blue circle drifts left over a black background")
    page.click("#branch-new")
    wait(page, lambda: page.text_content("#log .log-state") == "now showing")
    assert "shown from chunk 3 (1.3 s)" in (page.text_content("#log .log-times") or "")
    cable.close()


def test_a_file_can_be_dropped_and_a_picture_pasted(page: Page, files: Path) -> None:
    data = base64.b64encode((files / "first.png").read_bytes()).decode()
    file = {"name": "first.png", "type": "image/png", "data": data, "text": ""}
    assert page.evaluate(DISPATCH, {**file, "kind": "drop"}) is True
    assert page.is_visible("#reference-picture")
    page.click("#reference-remove")
    page.evaluate(DISPATCH, {**file, "kind": "paste", "text": "a cell of a table"})
    assert page.is_hidden("#reference-picture")
    page.evaluate(DISPATCH, {**file, "kind": "paste"})
    assert page.is_visible("#reference-picture")
    start(page, RED)
    wait(page, lambda: state(page) == "playing")
    page.click("#stop")
    wait(page, lambda: state(page) == "ended")


def test_a_file_that_is_dropped_on_a_running_video_changes_nothing(page: Page, files: Path) -> None:
    start(page, RED)
    wait(page, lambda: num_chunks(page) >= 1)
    data = base64.b64encode((files / "first.png").read_bytes()).decode()
    file = {"name": "first.png", "type": "image/png", "data": data, "text": ""}
    assert page.evaluate(DISPATCH, {**file, "kind": "drop"}) is True  # else the browser would open the file
    page.evaluate(DISPATCH, {**file, "kind": "paste"})
    page.click("#stop")
    wait(page, lambda: state(page) == "ended")
    assert page.text_content("#reference-name") == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "notes.txt is neither a picture nor a video."),
        ("large.png", "large.png has 33 MiB; the server takes at most 32 MiB."),
    ],
)
def test_a_file_beyond_the_limits_is_not_uploaded(page: Page, files: Path, name: str, message: str) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    choose(page, files / "first.png")
    choose(page, files / name)
    assert problem(page) == message
    assert (page.text_content("#reference-name") or "").startswith("first.png, ")  # the file before is kept
    assert not [url for url in requests if "/v1/" in url]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("damaged.png", "The file is a damaged image"),
        ("short.mp4", "The file has 20 frames at 24 per second, 0.83 s; expected one chunk"),
    ],
)
def test_a_file_that_the_server_refuses_is_one_line_and_starts_nothing(
    page: Page, files: Path, name: str, message: str
) -> None:
    choose(page, files / name)
    start(page, RED)
    wait(page, lambda: problem(page))
    assert problem(page).startswith(message) and problem(page).endswith(".")
    assert state(page) == "idle" and page.text_content("#notices") == ""
    assert page.evaluate("document.activeElement.id") == "reference-choose"
    choose(page, files / "first.png")
    assert problem(page) == ""


def test_a_model_without_an_encoder_is_asked_for_no_file(page: Page, server: ServerProcess, files: Path) -> None:
    def without_encoder(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "takes_references": False})

    page.route("**/v1/server", without_encoder)
    open_page(page, server.url)
    assert page.is_hidden("#reference-field") and page.is_visible("#send")
    data = base64.b64encode((files / "first.png").read_bytes()).decode()
    file = {"name": "first.png", "type": "image/png", "data": data, "text": ""}
    assert page.evaluate(DISPATCH, {**file, "kind": "drop"}) is True
    assert page.text_content("#reference-name") == ""


def test_an_upload_can_be_stopped(page: Page, files: Path) -> None:
    page.route("**/v1/references", lambda _route: None)  # the request gets no answer
    choose(page, files / "first.png")
    start(page, RED)
    wait(page, lambda: page.text_content("#status") == "Uploading")
    assert page.is_disabled("#reference-remove")
    page.click("#stop")
    wait(page, lambda: page.text_content("#status") == "Stopped")
    assert state(page) == "idle" and page.is_enabled("#reference-remove") and problem(page) == ""


def test_an_upload_needs_the_token_and_a_server(page: Page, serve: Callable[..., ServerProcess], files: Path) -> None:
    server = serve(token=TOKEN)
    open_page(page, server.url)
    choose(page, files / "first.png")
    start(page, RED, token="wrong-but-long-enough")
    wait(page, lambda: "The server rejected the token." in (page.text_content(".notice.error") or ""))
    assert page.evaluate("document.activeElement.id") == "token"
    start(page, RED, token=TOKEN, seconds="1")
    wait(page, lambda: state(page) == "ended")
    server.stop()
    page.press("#prompt", "Enter")
    wait(page, lambda: "The server cannot be reached." in (page.text_content(".notice.error") or ""))
    assert state(page) == "ended"  # the video of before can still be played


def test_the_keyboard_chooses_and_removes_a_file(page: Page, files: Path) -> None:
    page.focus("#prompt")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "reference-choose"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(files / "first.png")
    wait(page, lambda: page.is_visible("#reference-picture"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Remove the picture or video"
    page.keyboard.press("Space")
    assert page.is_hidden("#reference-picture")


@pytest.mark.parametrize("name", ["first.png", "clip.mp4", "short.mp4"])
def test_the_preview_fits_a_narrow_window(page: Page, files: Path, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{'a-long-name-' * 8}{name}"
    path.write_bytes((files / name).read_bytes())
    page.set_viewport_size({"width": 360, "height": 740})
    choose(page, path)
    wait(page, lambda: page.is_visible("#reference-video") or page.is_visible("#reference-picture"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#reference-remove").bounding_box()
    assert box and box["x"] + box["width"] <= 360
