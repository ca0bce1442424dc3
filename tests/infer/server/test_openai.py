"""The `openai` package of several versions, and the lines of the documentation, against a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.docs_blocks import Block, read_blocks
from tests.infer.server.conftest import RunningServer, Serve
from tests.infer.server.openai_program import OTHER_PROMPT, PROMPT, use_videos
from tests.infer.server.test_jobs import wait_for

TOKEN = "correct-horse-battery"
PROGRAM = Path(__file__).with_name("openai_program.py")
VERSIONS = ("2.8.0", "3.57.0")  # the first one sends JSON, the second one forms
PAGE = Path(__file__).parents[3] / "docs" / "server.md"
BLOCKS = [block for block in read_blocks("server.md", PAGE.read_text()) if "127.0.0.1:8000/v1" in block.text]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "first.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


def test_the_installed_version_works(serve: Serve, picture: Path) -> None:
    server = serve(token=TOKEN)
    check_answers(use_videos(server.url, TOKEN, "small", picture), openai.__version__)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_of_each_major_number_works(serve: Serve, picture: Path, tmp_path: Path, version: str) -> None:
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(packages), f"openai=={version}"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"openai {version} cannot be installed: {installed.stderr.strip()[-200:]}")
    server = serve(token=TOKEN)
    program = [sys.executable, str(PROGRAM), server.url, TOKEN, "small", str(picture)]
    result = subprocess.run(program, capture_output=True, text=True, env={"PYTHONPATH": str(packages)})
    assert result.returncode == 0, result.stderr
    check_answers(json.loads(result.stdout), version)


def check_answers(answers: dict[str, Any], version: str) -> None:
    assert answers["version"] == version
    assert answers["models"] == ["small", "small"]
    assert answers["created"] == ["queued"] * 3
    done = [["completed", 100, seconds, prompt] for seconds, prompt in (("0.5", PROMPT), ("4", PROMPT))]
    assert answers["done"] == [*done, done[0], ["completed", 100, "0.5", OTHER_PROMPT]]
    assert answers["remixed_from"][0] == answers["remixed_from"][1]
    listed, created = answers["listed"]
    assert listed == created and len(set(listed)) == 4
    start = {name: bytes.fromhex(start) for name, start in answers["files"].items()}
    assert start["default"] == start["video"] and start["video"][4:8] == b"ftyp"
    assert (start["thumbnail"][:4], start["thumbnail"][8:]) == (b"RIFF", b"WEBP")
    assert start["spritesheet"][:3] == b"\xff\xd8\xff"
    assert [error[:3] for error in answers["errors"]] == [
        [422, field, "bad_request"] for field in ("model", "size", "input_reference")
    ]
    messages = ["expected small", "generates 64x32", "neither a picture nor a video"]
    assert all(part in error[3] for part, error in zip(messages, answers["errors"], strict=True))
    assert answers["deleted"] is True and answers["gone"][0] == 404


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=lambda b: b.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_python_of_the_documentation_runs(
    serve: Serve, picture: Path, monkeypatch: pytest.MonkeyPatch, block: Block
) -> None:
    monkeypatch.chdir(picture.parent)
    text = on_server(block.text, serve())
    exec(compile(text, block.name, "exec"), {"__name__": "__main__"})
    for name in re.findall(r'write_to_file\("(.+?)"\)', text):
        assert Path(name).stat().st_size > 0


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.language], ids=lambda b: b.name)
def test_curl_of_the_documentation_runs(serve: Serve, picture: Path, block: Block) -> None:
    server = serve()
    first: dict[str, Any] = {}
    commands = on_server(block.text, server).replace("\\\n", "").splitlines()
    assert commands
    for command in commands:
        line = command.replace("/ID", f"/{first.get('id')}")
        result = subprocess.run(
            ["bash", "-c", f"{line} --fail-with-body --silent"], cwd=picture.parent, capture_output=True, text=True
        )
        assert result.returncode == 0, (line, result.stdout)
        answer = json.loads(result.stdout) if result.stdout else {}
        if answer.get("object") == "video" and not first:
            first = answer
            with server.http() as http:
                wait_for(http, first, "completed")
        for name in re.findall(r"-o (\S+)", line):
            assert (picture.parent / name).stat().st_size > 0


def on_server(text: str, server: RunningServer) -> str:
    """Return a text of the documentation with the address and the model of a server."""
    return text.replace("http://127.0.0.1:8000", server.url).replace("tiny", "small")
