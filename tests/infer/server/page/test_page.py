"""The page in a browser, connected to `longvideo serve` with tiny: what users do and see."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest

from longvideo.evaluation.judge import judge
from longvideo.evaluation.request import read_caption
from tests.infer.server.conftest import ServerProcess
from tests.infer.server.page.conftest import (
    RED,
    TOKEN,
    Cable,
    num_chunks,
    open_page,
    picture,
    played,
    start,
    state,
    wait,
)

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

BLUE = "a large blue circle drifts left over a black background"


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


def test_a_paused_video_stays_paused_when_the_connection_is_restored(page: Page, server: ServerProcess) -> None:
    cable = Cable(server.port)
    open_page(page, cable.url)
    start(page, RED)
    wait(page, lambda: num_chunks(page) >= 2 and played(page) > 0)
    page.click("#pause")
    cable.cut()
    wait(page, lambda: state(page) == "lost")
    wait(page, lambda: state(page) != "lost")
    assert state(page) == "paused" and page.text_content("#pause") == "Resume"
    assert page.evaluate("document.querySelector('#video').paused")
    page.click("#pause")
    before = num_chunks(page)
    wait(page, lambda: state(page) == "playing" and num_chunks(page) > before)
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
    assert {name for names in references if names for name in names.split()} <= set(ids)
    assert page.get_attribute("#status", "role") == "status"
