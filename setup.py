"""List every package of the distribution; everything else about it is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

ROOMS = {
    "longvideo": "longvideo",
    "longvideo.kernels": "kernels",
    "longvideo.train": "train",
    "longvideo.distill": "distill",
    "longvideo.infer": "infer",
    "longvideo.configs": "configs",
}
DATA_SUFFIXES = ("yaml", "json", "jsonl", "txt", "safetensors", "html", "css", "js", "png", "svg")


def packages() -> list[str]:
    """Return every folder of every room under its import name, folders that hold only data included."""
    names = []
    for room, folder in ROOMS.items():
        names += [room, *(f"{room}.{name}" for name in find_namespace_packages(folder, exclude=["*__pycache__*"]))]
    return names


setup(
    packages=packages(),
    package_dir=ROOMS,
    package_data={"": ["py.typed", *(f"*.{suffix}" for suffix in DATA_SUFFIXES)]},
)
