"""Pictures of the page for the documentation, recorded in a browser."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from longvideo.evaluation.sheet import write_animation, write_picture
from tests.infer.server.conftest import ServerProcess
from tests.infer.server.page.conftest import RED, num_chunks, open_page, played, start, wait

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

GIF_FPS = 6
MAX_GIF_BYTES = 600_000
STAR = "a small yellow star spins on a meadow"
NIGHT = "at night, a red star falls while a cyan ring flies to the left"


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
