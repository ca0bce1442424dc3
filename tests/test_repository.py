"""Files for those who contribute, release and deploy: what they name exists, and what they compare is compared."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import longvideo
from tests.docs_blocks import launch, read_commands
from tests.docs_commands import ROOT, check_command, parse
from tests.options import OPTIONS

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
BASELINE = ROOT / ".ci" / "baselines" / "stream_h200.json"
SHELL_FILES = [ROOT / ".ci" / "run", ROOT / ".ci" / "release", *sorted((ROOT / "examples").glob("*.sh"))]


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in read_yaml(path)["jobs"].values():
        yield from job["steps"]


def recipes(target: str) -> list[str]:
    """Return the commands of a make target."""
    printed = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return printed.splitlines()


def test_there_is_a_workflow_for_changes_releases_and_gpus() -> None:
    assert [path.stem for path in WORKFLOWS] == ["ci", "gpu", "release"]
    assert read_yaml(WORKFLOWS[0])["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.10", "3.12"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_command_of_a_workflow_exists(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [step["run"] for step in steps(path) if "run" in step]
    assert runs
    for words in (words for run in runs for words in read_commands(run)):
        if "/" in words[0]:
            assert (ROOT / words[0]).stat().st_mode & 0o111, f"{words[0]} is not a program"
        else:
            check_command(*launch(words), monkeypatch)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_of_a_workflow_has_a_version(path: Path) -> None:
    actions = [step["uses"] for step in steps(path) if "uses" in step]
    assert actions and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in actions)


def test_the_commands_for_gpus_exist() -> None:
    (command,) = [line for line in recipes("bench-gpu") if "bench stream" in line]
    parse(command.split()[1:])
    (compare,) = [line for line in recipes("bench-gpu") if "compare" in line]
    assert all((ROOT / word).is_file() for word in compare.split()[1:3])


def test_issue_forms_ask_for_the_report_of_doctor() -> None:
    for name in ("bug", "feature"):
        form = read_yaml(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")
        labels = [field["attributes"]["label"] for field in form["body"]]
        assert "Output of `longvideo doctor --json`" in labels
    assert "longvideo doctor --json" in (GITHUB / "pull_request_template.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_files_are_programs_that_bash_can_read(path: Path) -> None:
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_guide_lists_every_option_of_the_tests_with_its_default() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(--[^`]+)` \| .* \| (\S+) \|$", guide, re.MULTILINE))
    defaults = {f"{option.name} {option.metavar}": option.default for option in OPTIONS}
    assert rows == {name: "skipped" if value is None else f"{value:g}" for name, value in defaults.items()}


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["version"] == longvideo.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)


def instructions(name: str) -> list[str]:
    """Return the arguments of every instruction of this name in the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


def test_the_image_serves_as_a_user_without_rights() -> None:
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["longvideo"]
    arguments = json.loads(instructions("CMD")[0])
    assert arguments[0] == "serve"
    parse(arguments)
    assert instructions("USER") == ["longvideo"]
    assert instructions("FROM")[0].startswith("nvidia/cuda:")


def test_the_image_is_built_from_files_that_exist_and_are_sent() -> None:
    sources = [word for line in instructions("COPY") for word in line.split()[:-1]]
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert all((ROOT / source).exists() for source in sources)
    assert {f"!{source}" for source in sources} == {line for line in ignore if line.startswith("!")}


def test_the_health_check_asks_for_a_path_that_needs_no_token() -> None:
    from longvideo.infer.server.security import OPEN_PATHS

    (check,) = instructions("HEALTHCHECK")
    (path,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", check)
    assert path in OPEN_PATHS


def compare(baseline: Path, result: Path, *ratio: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / "compare_stream.py"), str(baseline), str(result), *ratio]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.09, 0), (1.11, 1)])
def test_a_slower_stream_than_the_baseline_is_reported(tmp_path: Path, factor: float, code: int) -> None:
    result = json.loads(BASELINE.read_text(encoding="utf-8"))
    result["step_ms"] *= factor
    (tmp_path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    ran = compare(BASELINE, tmp_path / "result.json")
    assert ran.returncode == code and ran.stdout.count("TOO SLOW") == code
    assert f"step_ms: {209 * factor:g}, {factor:.3f} of 209" in ran.stdout


def test_results_of_other_settings_are_not_compared(tmp_path: Path) -> None:
    result = json.loads(BASELINE.read_text(encoding="utf-8")) | {"steps": 4}
    (tmp_path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    ran = compare(BASELINE, tmp_path / "result.json")
    assert ran.returncode == 2 and "steps is 4; expected 2" in ran.stderr
