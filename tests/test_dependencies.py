"""Declarations tell the truth: what is imported is declared where it is needed, and what is declared is imported."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parent.parent
PACKAGES = {"longvideo": "longvideo"} | {
    name: f"longvideo.{name}" for name in ("kernels", "train", "distill", "infer", "configs")
}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "cudnn": "nvidia-cudnn-frontend",
    "transformer_engine": "transformer-engine",
}
"""Names of distributions that differ from those under which they are imported."""
OWNED = {
    "longvideo.infer.server": "serve",
    "longvideo.distill": "train",
    "longvideo.quantization.lora": "train",
    "longvideo.training": "train",
    "longvideo.training.run_log": "wandb",
    "longvideo.kernels.te": "te",
    "longvideo.kernels.fp8.te": "te",
    "longvideo.kernels.nvfp4.te": "te",
    "longvideo.kernels.attention.cudnn_fp8": "cudnn",
    "longvideo.integrations": "diffusers",
    "longvideo.checkpoint.gguf_file": "gguf",
}
"""The extra that brings what modules of these packages import besides the core."""
BROUGHT_BY_TORCH = {"triton"}  # where torch is built for CUDA; elsewhere nothing needs it
NEEDED_BY = {"torch.utils.tensorboard": "tensorboard", "starlette.requests": "python-multipart"}
"""Modules that need another package for what is used of them."""
OWN_ENVIRONMENT = {
    "tests/fixtures/make_modelopt_exports.py",
    "tests/fixtures/make_nvfp4_oracles.py",
    "tests/fixtures/make_spiece.py",
}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {(requirement := Requirement(line)).name: requirement for line in lines}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = requirements(PROJECT["dependencies"])
EXTRAS = {extra: requirements(lines) for extra, lines in PROJECT["optional-dependencies"].items()}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield the name and the code of every module of the package."""
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            # of a package, what is imported may be a module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def distribution(imported: str) -> str | None:
    """Return the distribution that an import needs, None for Python's own modules and ours."""
    if imported in NEEDED_BY:
        return NEEDED_BY[imported]
    top = imported.partition(".")[0]
    if top in sys.stdlib_module_names or top in ("longvideo", "tests"):
        return None
    return DISTRIBUTIONS.get(top, top)


def owners(module: str) -> set[str]:
    return {extra for package, extra in OWNED.items() if f"{module}.".startswith(f"{package}.")}


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """Yield what is imported with a module, and not later, in a function, or for type checkers alone."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)


def test_every_import_is_declared_in_the_core_or_in_the_extra_that_owns_the_module() -> None:
    undeclared = []
    for module, tree in modules():
        allowed = set(CORE) | BROUGHT_BY_TORCH | {name for extra in owners(module) for name in EXTRAS[extra]}
        undeclared += [(module, name) for name in map(distribution, imports(tree)) if name and name not in allowed]
    assert not undeclared


def test_everything_declared_is_imported() -> None:
    needed: dict[str, set[str]] = {}
    for module, tree in modules():
        needed.setdefault(module, set()).update(filter(None, map(distribution, imports(tree))))
    everything = set().union(*needed.values())
    assert not set(CORE) - everything
    for extra in sorted(set(OWNED.values())):
        own = set().union(*(packages for module, packages in needed.items() if extra in owners(module)))
        assert not set(EXTRAS[extra]) - own, extra


def test_what_the_tests_import_is_declared() -> None:
    allowed = set(CORE) | set(EXTRAS["test"]) | {"packaging", "tomli"}  # pytest needs both
    for extra in EXTRAS["test"]["longvideo"].extras:
        allowed |= set(EXTRAS[extra])
    undeclared = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if place not in OWN_ENVIRONMENT:
            # what only one of the extras brings is skipped where it is missing
            names = set(map(distribution, imports(ast.parse(path.read_text(encoding="utf-8"))))) - {None}
            undeclared += [(place, name) for name in names - allowed - set(EXTRAS["te"])]
    assert not undeclared


@pytest.mark.parametrize("entry", ["longvideo.cli.main", "longvideo.infer.pipeline", "longvideo.distill.merging"])
def test_generation_conversion_and_merging_import_the_core_alone(entry: str) -> None:
    """What is imported at once by these, by all commands, and by what those import."""
    trees = dict(modules())
    reached: set[str] = set()
    waiting = [entry, *(name for name in trees if name.startswith(("longvideo.cli.", "longvideo.checkpoint.")))]
    packages: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        if module in reached or module not in trees:
            continue
        reached.add(module)
        for imported in imported_at_once(trees[module]):
            if imported.startswith("longvideo"):
                waiting.append(imported)
            elif name := distribution(imported):
                packages[name] = module
    assert len(reached) > 30
    assert not {name: module for name, module in packages.items() if name not in CORE}


def test_messages_about_a_missing_package_name_the_extra_that_brings_it() -> None:
    named = []
    for module, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                extra = next(keyword.value for keyword in node.keywords if keyword.arg == "extra")
                assert isinstance(extra, ast.Constant) and extra.value in owners(module) | {"train", "serve"}, module
                named.append(extra.value)
                if isinstance(node.args[0], ast.Constant):
                    assert node.args[0].value in EXTRAS[extra.value], module
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                extras = re.findall(r"pip install '?\"?longvideo\[(\w+)\]", node.value)
                assert set(extras) <= set(EXTRAS), module
                named += extras
    assert {"train", "serve", "wandb", "te", "cudnn", "diffusers", "gguf"} <= set(named)


# each extra alone, in an environment of its own


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, because a build leaves files next to it."""
    copy = tmp_path_factory.mktemp("source") / "longvideo"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "tests", "docs", "runs")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    return copy


def environment_with(source: Path, folder: Path, extra: str | None) -> Path:
    """Create a virtual environment with longvideo and only one extra; return its `bin`."""
    venv.create(folder, with_pip=True, system_site_packages=False)
    requirement = str(source) if extra is None else f"{source}[{extra}]"
    torch_version = torch.__version__.partition("+")[0]
    command = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    constraints = [] if f"torch=={torch_version}\n" not in CONSTRAINTS else ["-c", str(ROOT / "constraints.txt")]
    ran = subprocess.run(
        [*command, *constraints, f"torch=={torch_version}", requirement], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder / "bin"


CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def run(program: Path, *arguments: object, code: int = 0) -> str:
    """Run a program of an environment and return what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in (program, *arguments)],
        cwd=program.parent,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == code, (arguments, done.stdout[-1000:], done.stderr[-3000:])
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_core_alone_generates_quantizes_and_says_what_else_is_needed(source: Path, tmp_path: Path) -> None:
    program = environment_with(source, tmp_path / "venv", None) / "longvideo"
    assert "generate" in run(program, "--help")
    run(program, "generate", "a red circle", "--seconds", "0.5", "--steps", "1", "-o", tmp_path / "film.mp4")
    assert (tmp_path / "film.mp4").stat().st_size > 1000
    run(program, "quantize", "tiny", tmp_path / "packed")
    run(program, "info", tmp_path / "packed")
    run(program, "train", "ar", "tiny/ar", "vae=tiny", "initialize=tiny-teacher", *SHORT, "--dry-run", "1")
    assert "pip install 'longvideo[serve]'" in run(program, "serve", code=2)
    assert "pip install 'longvideo[train]'" in run(program, "distill", "tiny/dmd", "--dry-run", "1", code=2)
    assert "pip install 'longvideo[wandb]'" in run(program, "train", "ar", *SHORT, "trainer.wandb=x", code=2)


SHORT = ("scenes.count=8", "bank={clips: 2, initial_clips: 2, group: 2}", "stages=[{chunks: 1, batch: 1, steps: 1}]")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_extra_train_alone_trains_in_processes_and_distills(source: Path, tmp_path: Path) -> None:
    programs = environment_with(source, tmp_path / "venv", "train")
    launch = (programs / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    models = ("vae=tiny", "initialize=tiny-teacher")
    run(*launch, "-m", "longvideo", "train", "ar", "tiny/ar", *models, *SHORT, "--dry-run", "1")
    small = ("stages=[{frames: 8, batch: 1, steps: 1}]", "lora={rank: 4, alpha: 4}", "--dry-run", "1")
    run(programs / "longvideo", "distill", "tiny/dmd", *small)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_extra_serve_alone_builds_the_server(source: Path, tmp_path: Path) -> None:
    programs = environment_with(source, tmp_path / "venv", "serve")
    run(programs / "longvideo", "serve", "--help")
    code = "import longvideo.infer.server.run, websockets, uvicorn; print(uvicorn.__version__)"
    run(programs / "python", "-c", code)
