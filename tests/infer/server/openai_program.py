"""A program that uses videos of a server through the `openai` package, whatever its version.

    python openai_program.py URL TOKEN MODEL PICTURE

It prints the answers as JSON. PICTURE is a file with the first frame of a video.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from openai import APIStatusError, OpenAI, __version__

PROMPT, OTHER_PROMPT = "a red ball bounces", "a blue square spins"


def use_videos(url: str, token: str, model: str, picture: Path) -> dict[str, Any]:
    """Create, poll, list, download, remix and delete videos; return what the server answered."""
    warnings.simplefilter("ignore", DeprecationWarning)  # the package marks the whole interface as deprecated
    with OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0) as client:
        videos: Any = client.videos  # without its types, which differ between versions
        (served,) = client.models.list()
        options: dict[str, Any] = {"seed": 7, "seconds": 0.5}
        first = videos.create(model=model, prompt=PROMPT, extra_body=options)
        second = videos.create(model=model, prompt=PROMPT, seconds="4", extra_body={"size": first.size})
        third = videos.create(model=model, prompt=PROMPT, input_reference=picture, extra_body=options)
        done = [videos.poll(video.id, poll_interval_ms=20) for video in (first, second, third)]
        remix = videos.poll(videos.remix(first.id, prompt=OTHER_PROMPT).id, poll_interval_ms=20)
        listed = [video.id for video in videos.list(limit=1, order="asc")]  # each page has one video
        answers = {
            "version": __version__,
            "models": [served.id, client.models.retrieve(model).id],
            "created": [first.status, second.status, third.status],
            "done": [[video.status, video.progress, video.seconds, video.prompt] for video in (*done, remix)],
            "remixed_from": [remix.remixed_from_video_id, first.id],
            "listed": [listed, [first.id, second.id, third.id, remix.id]],
            "files": {
                name: videos.download_content(first.id, **variant).read()[:12].hex()
                for name, variant in VARIANTS.items()
            },
            "errors": [
                _error(lambda: videos.create(model="sora-2", prompt=PROMPT)),
                _error(lambda: videos.create(prompt=PROMPT, size="720x1280")),
                _error(lambda: videos.create(prompt=PROMPT, input_reference=b"no picture")),
            ],
            "deleted": videos.delete(first.id).deleted,
        }
        return {**answers, "gone": _error(lambda: videos.retrieve(first.id))}


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    **{name: {"variant": name} for name in ("video", "thumbnail", "spritesheet")},
}


def _error(request: Any) -> list[Any]:
    try:
        return [request()]
    except APIStatusError as error:
        return [error.status_code, error.param, error.code, error.message]


if __name__ == "__main__":
    address, secret, name, file = sys.argv[1:]
    print(json.dumps(use_videos(address, secret, name, Path(file))))
