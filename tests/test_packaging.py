"""The wheel and the source distribution hold every file of the packages under `longvideo`, and nothing else."""

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "longvideo": "longvideo",
    "kernels": "longvideo/kernels",
    "train": "longvideo/train",
    "distill": "longvideo/distill",
    "infer": "longvideo/infer",
    "configs": "longvideo/configs",
}
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")
NOT_SHIPPED = {".pyc", ".md"}
MAX_TRACKED_BYTES = 52 * 2**20


def shipped_files(source: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file of the packages under `source` and its path in a wheel."""
    for folder, place in FOLDERS.items():
        for path in sorted((source / folder).rglob("*")):
            if path.is_file() and path.suffix not in NOT_SHIPPED and "__pycache__" not in path.parts:
                yield path, f"{place}/{path.relative_to(source / folder).as_posix()}"


def build_wheel(source: Path, out: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*command, "-w", out, source], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def _contents(wheel: zipfile.ZipFile) -> dict[str, int]:
    """Return the checksum of every file but those that describe the distribution."""
    return {info.filename: info.CRC for info in wheel.infolist() if ".dist-info/" not in info.filename}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, because setuptools reuses the files of an older build."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    build_wheel(source, out)
    return zipfile.ZipFile(next(out.glob("longvideo-*.whl")))


def test_every_file_of_the_packages_is_in_the_wheel(source: Path, wheel: zipfile.ZipFile) -> None:
    missing = {place for _, place in shipped_files(source)} - set(wheel.namelist())
    assert not missing, f"add their suffix to package-data in pyproject.toml: {sorted(missing)}"


def test_the_links_of_the_tree_name_the_folders_at_the_root() -> None:
    links = {path.name: path.resolve() for path in (ROOT / "longvideo").iterdir() if path.is_symlink()}
    assert links == {folder: ROOT / folder for folder in FOLDERS if folder != "longvideo"}


def test_the_source_distribution_builds_the_same_wheel(source: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    # the build writes files next to the sources, which the other tests read
    shutil.copytree(source, tmp_path / "source", symlinks=True)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "source", capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("longvideo-*.tar.gz"))) as archive:
        assert not [member.name for member in archive if not (member.isfile() or member.isdir())]
        archive.extractall(tmp_path, filter="data")
    unpacked = next(path for path in tmp_path.glob("longvideo-*") if path.is_dir())
    build_wheel(unpacked, tmp_path / "wheel")
    rebuilt = zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl")))
    assert _contents(rebuilt) == _contents(wheel)


def test_files_arrive_unchanged(source: Path, wheel: zipfile.ZipFile) -> None:
    for path, place in shipped_files(source):
        assert wheel.read(place) == path.read_bytes(), place


def test_nothing_but_longvideo_is_installed(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"longvideo"}
    assert not [name for name in wheel.namelist() if name.startswith("longvideo/tests")]


def test_packages_with_code_have_an_init(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    folders = {name.rpartition("/")[0] for name in names if name.endswith(".py")}
    assert {folder for folder in folders if f"{folder}/__init__.py" not in names} == set()


def test_the_presets_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for name in ("vae", "vae_refine", "decoder", "ar_opening", "ar", "recolor", "dmd"):
        assert f"longvideo/configs/tiny/{name}.yaml" in names
    assert "longvideo/py.typed" in names


def test_the_shipped_models_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    weights = "longvideo/weights"
    expected = {
        *(f"{weights}/{name}/model_index.json" for name in ("tiny", "tiny-teacher")),
        *(f"{weights}/{name}/longvideo.json" for name in ("tiny", "tiny-teacher")),
        *(f"{weights}/{name}/transformer/diffusion_pytorch_model.safetensors" for name in ("tiny", "tiny-teacher")),
        f"{weights}/tiny/vae/diffusion_pytorch_model.safetensors",
        f"{weights}/tiny/text_encoder/model.safetensors",
    }
    assert expected <= set(wheel.namelist())


def test_the_tracked_files_are_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is not a git repository, so no files are tracked")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    largest = sorted(sizes, key=lambda file: -sizes[file])[:5]
    assert sum(sizes.values()) < MAX_TRACKED_BYTES, [(str(file), sizes[file]) for file in largest]


def test_the_console_script_and_the_licence_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    texts = {name.rpartition("/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "longvideo = longvideo.cli.main:main" in wheel.read(texts["entry_points.txt"]).decode()
    assert "Apache License" in wheel.read(texts["LICENSE"]).decode()
    metadata = wheel.read(texts["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata


def test_transformer_engine_is_in_its_own_extra_alone(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    lines = [line for line in wheel.read(name).decode().splitlines() if "transformer-engine" in line]
    assert lines and all('extra == "te"' in line for line in lines)


def test_no_module_imports_a_package_by_its_folder_name() -> None:
    folders = FOLDERS.keys() - {"longvideo"}
    for path, _ in shipped_files(ROOT):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not folders & {name.split(".")[0] for name in names}, path


def test_kernels_init_has_no_side_effects() -> None:
    # Hugging Face's package has the same name: transformers may find this one and look for __version__
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.Expr | ast.ImportFrom) for node in body)
    assert "__version__" not in (ROOT / "kernels" / "__init__.py").read_text()
