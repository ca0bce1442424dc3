"""Draw the packages of longvideo in their layers, and the four data paths, as `docs/images/design.svg`.

The layers are those that import-linter checks, read from `pyproject.toml`, so the picture cannot differ from the code.
`python docs/site/diagram.py` writes the file; `make docs` draws it again, and a test compares the two.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "design.svg"

PURPOSES = {
    "cli": "every command",
    "integrations": "pipeline for diffusers",
    "train": "AR training, autoencoder",
    "distill": "DMD to 4 or 2 steps",
    "infer": "pipeline, sessions, server",
    "evaluation": "judge, tables, pictures",
    "training": "trainer, engines, runs",
    "streaming": "the model, for speed",
    "data": "videos, clips, encoding",
    "checkpoint": "formats in and out",
    "rollout": "chunk after chunk",
    "shapeworld": "procedural videos",
    "quantization": "NVFP4, FP8, LoRA layers",
    "text": "UMT5 and its tokenizer",
    "vae": "autoencoder",
    "model": "transformer and KV cache",
    "distributed": "ranks, device mesh",
    "config": "YAML and key=value",
    "flow": "noise levels, solver",
    "machine": "host, GPUs",
    "pixels": "floats to uint8",
    "files": "atomic writes, locks",
    "permissions": "private files",
    "errors": "UserError",
    "kernels": "torch, Triton, native",
}
"""Purpose of each package in a few words."""

PATHS = {
    "train": ("manifest", "encoded clips", "views: noise, layout", "velocity loss", "run folder"),
    "distill": ("prompts", "rollout of the student", "teacher and critic", "DMD gradient", "adapter, model"),
    "generate": ("script", "text features", "rollout, KV cache", "decoder", "video or socket"),
    "convert": ("files of any format", "names and shapes", "one tensor at a time", "cast, pack, merge", "model folder"),
}
"""Stations of the four data paths, in order."""

WIDTH, MARGIN, GAP = 980, 16, 10
ROW, BOX = 62, 46
STYLE = """
text { font-family: system-ui, sans-serif; fill: #1c2530; font-size: 12px; text-anchor: middle; }
.name { font-family: ui-monospace, monospace; font-size: 13px; font-weight: 600; }
.note { font-size: 12px; fill: #55606d; text-anchor: start; }
rect { fill: #eef3fa; stroke: #7d94b5; rx: 5; }
.app { fill: #fdf1df; stroke: #c79a4b; }
.kernels { fill: #e9f5ea; stroke: #74a878; }
.path { fill: #f6f6f8; stroke: #a5a9b3; }
.page { fill: #ffffff; stroke: none; }
path { stroke: #55606d; fill: none; marker-end: url(#tip); }
"""


def read_layers() -> list[list[str]]:
    """Return the names of the packages in each layer, the top layer first, without the module `__main__`."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(table["layers"] for table in tables if table["id"] == "layers")
    names = ([name.strip(" ()") for name in layer.replace(":", "|").split("|")] for layer in layers)
    return [layer for layer in names if not layer[0].startswith("__")]


def draw() -> str:
    """Return the picture as SVG."""
    layers = read_layers()
    title = "Each package imports only packages of lower layers."
    parts = [_note(MARGIN, 26, title)]
    y = 40
    for layer in layers:
        parts += _row(y, [(name, PURPOSES[name], _kind(name)) for name in layer])
        y += ROW
    parts.append(_note(MARGIN, y + 18, "The four data paths, from left to right."))
    y += 32
    for name, stations in PATHS.items():
        parts += _path(y, name, stations)
        y += ROW
    body = "\n".join(parts)
    marker = '<marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    marker += '<polygon points="0 0, 8 4, 0 8" fill="#55606d"/></marker>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img" '
        f'aria-label="Packages and data paths of longvideo">\n<style>{STYLE}</style>\n<defs>{marker}</defs>\n'
        f'<rect class="page" width="{WIDTH}" height="{y}"/>\n{body}\n</svg>\n'
    )


def _kind(name: str) -> str:
    if name in ("cli", "train", "distill", "infer"):
        return "app"
    return "kernels" if name == "kernels" else "library"


def _row(y: int, boxes: list[tuple[str, str, str]]) -> list[str]:
    width = (WIDTH - 2 * MARGIN - GAP * (len(boxes) - 1)) / len(boxes)
    parts = []
    for index, (name, purpose, kind) in enumerate(boxes):
        x = MARGIN + index * (width + GAP)
        parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BOX}"/>')
        parts.append(f'<text class="name" x="{x + width / 2:.1f}" y="{y + 19}">{escape(name)}</text>')
        parts.append(f'<text x="{x + width / 2:.1f}" y="{y + 36}">{escape(purpose)}</text>')
    return parts


def _path(y: int, name: str, stations: tuple[str, ...]) -> list[str]:
    label, arrow = 80, 18
    width = (WIDTH - 2 * MARGIN - label - arrow * (len(stations) - 1)) / len(stations)
    parts = [f'<text class="name" style="text-anchor: start" x="{MARGIN}" y="{y + 28}">{escape(name)}</text>']
    for index, station in enumerate(stations):
        x = MARGIN + label + index * (width + arrow)
        parts.append(f'<rect class="path" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BOX}"/>')
        parts.append(f'<text x="{x + width / 2:.1f}" y="{y + 28}">{escape(station)}</text>')
        if index:
            parts.append(f'<path d="M {x - arrow:.1f} {y + BOX / 2:.1f} H {x - 1:.1f}"/>')
    return parts


def _note(x: int, y: int, text: str) -> str:
    return f'<text class="note" x="{x}" y="{y}">{escape(text)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
