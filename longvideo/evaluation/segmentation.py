"""Detect the background of a clip and the colored objects in front of it.

T frames, H W pixels. Pictures are float32 in [0, 255]. The frame is treated as a torus: the parts of an object that
leaves on one side and enters on the other are one object.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from longvideo.shapeworld.render import render_backgrounds
from longvideo.shapeworld.world import BACKGROUNDS, COLORS, WORLD_HEIGHT

UNKNOWN = "unknown"
FOREGROUND_DISTANCE = 45.0  # gray levels; the smallest distance between an object and a background is 100
BACKGROUND_DISTANCE = 40.0  # where the clip's median is this near to the ideal background, it replaces it
UNKNOWN_BACKGROUND = 40.0
MIN_AREA = 60.0  # square world units: half of a small star at the smallest size of its pulse
MIN_PRESENCE = 0.35  # share of the frames in which an object must be visible
SAME_OBJECT_OVERLAP = 0.3  # two colors that occur together less often than this are one flickering object
TOUCHING_SHARE = 0.2
LEAST_ALONE = 0.2  # share of the frames in which an object must be separate from others
LIGHTNESS_WEIGHT = 0.5
UNKNOWN_COLOR = 48.0  # distance in CIELAB from every known color
TABLE_BITS = 5


@dataclass(frozen=True)
class Background:
    """The background of a clip. name: the nearest known one. picture_HW3: the picture to subtract from each frame."""

    name: str
    picture_HW3: np.ndarray


@dataclass(frozen=True)
class Blob:
    """One object of a clip, with its pixels in each frame."""

    colors: tuple[int, ...]  # indices into COLORS; more than one if its color flickers
    frames: np.ndarray  # indices of the frames in which it is visible
    masks: np.ndarray  # bool, one for each of `frames`


@dataclass
class Component:
    """A connected region of one frame, as runs (row, first column, last column + 1)."""

    runs: list[tuple[int, int, int]]
    area: int
    votes: np.ndarray  # number of pixels of each known color, without those at the outline if possible


def fit_background(frames: np.ndarray) -> Background:
    """Return the known background with the smallest median distance to the clip's temporal median."""
    median = median_of_five(frames[np.linspace(0, len(frames) - 1, 5).round().astype(int)]).astype(np.float32)
    templates = background_pictures(*median.shape[:2])
    coarse = median[::2, ::2]
    spread = [float(np.median(np.abs(coarse - t[::2, ::2]).max(-1))) for t in templates]
    best = int(np.argmin(spread))
    shift = np.median((coarse - templates[best][::2, ::2]).reshape(-1, 3), axis=0)
    ideal = templates[best] + shift
    is_bare = np.abs(median - ideal).max(-1, keepdims=True) < BACKGROUND_DISTANCE
    name = BACKGROUNDS[best] if spread[best] < UNKNOWN_BACKGROUND else UNKNOWN
    return Background(name, np.where(is_bare, median, ideal))


def find_blobs(frames: np.ndarray, background: Background) -> tuple[list[Blob], int]:
    """Return the objects, largest first, and the typical number of separate regions in a frame."""
    height = frames.shape[1]
    difference = frames.astype(np.float32)
    difference -= background.picture_HW3
    mask = np.einsum("thwc,thwc->thw", difference, difference) > FOREGROUND_DISTANCE**2
    core = erode(mask)
    min_area = MIN_AREA * (height / WORLD_HEIGHT) ** 2
    by_frame = []
    labels = np.full(mask.shape, -1, np.int8)
    labels[mask] = nearest_color(frames[mask])
    for parts in connected_components(mask, core, labels):
        parts = join_across_border(parts, mask.shape[1:], min_area=min_area)
        by_frame.append([part for part in parts if part.area >= min_area])
    groups = group_colors(by_frame)
    count = int(np.median([len(parts) for parts in by_frame]) + 0.5) if by_frame else 0
    return [blob for blob in (collect_blob(g, groups, by_frame, labels) for g in groups) if len(blob.frames)], count


def median_of_five(frames: np.ndarray) -> np.ndarray:
    """Return the median of five uint8 pictures by comparing whole pictures, 50 times as fast as sorting each pixel."""
    a, b, c, d, e = frames
    low = np.maximum(np.minimum(a, b), np.minimum(c, d))
    high = np.minimum(np.maximum(a, b), np.maximum(c, d))
    return np.maximum(np.minimum(low, high), np.minimum(np.maximum(low, high), e))


@lru_cache(maxsize=4)
def background_pictures(height: int, width: int) -> np.ndarray:
    """Render all known backgrounds: [6, H, W, 3] in [0, 255]."""
    return ((render_backgrounds(height, width).permute(0, 2, 3, 1).numpy() + 1) * 127.5).astype(np.float32)


def erode(mask: np.ndarray) -> np.ndarray:
    """Keep the pixels whose four neighbors are set too; pixels outside of the border count as set."""
    kept = mask.copy()
    kept[..., 1:, :] &= mask[..., :-1, :]
    kept[..., :-1, :] &= mask[..., 1:, :]
    kept[..., :, 1:] &= mask[..., :, :-1]
    kept[..., :, :-1] &= mask[..., :, 1:]
    return kept


def dilate(mask: np.ndarray) -> np.ndarray:
    """Add the four neighbors of every set pixel."""
    grown = mask.copy()
    grown[..., 1:, :] |= mask[..., :-1, :]
    grown[..., :-1, :] |= mask[..., 1:, :]
    grown[..., :, 1:] |= mask[..., :, :-1]
    grown[..., :, :-1] |= mask[..., :, 1:]
    return grown


def connected_components(mask: np.ndarray, core: np.ndarray, labels: np.ndarray) -> list[list[Component]]:
    """Return the connected components of each frame: runs joined over adjacent rows. mask, core, labels: [T, H, W]."""
    num_frames, height, width = mask.shape
    padded = np.zeros((num_frames * height, width + 2), np.int8)
    padded[:, 1:-1] = mask.reshape(-1, width)
    rows, columns = np.divmod(np.flatnonzero(padded[:, 1:] != padded[:, :-1]), width + 1)
    runs = list(zip(rows[::2].tolist(), columns[::2].tolist(), columns[1::2].tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    above: list[int] = []
    current: list[int] = []
    current_row = -1
    for index, (row, first, last) in enumerate(runs):
        if row != current_row:
            above = current if row == current_row + 1 and row % height else []
            current, current_row = [], row
        for other in above:
            if runs[other][1] < last and first < runs[other][2]:
                parent[root(other)] = root(index)
        current.append(index)
    owner = np.array([root(index) for index in range(len(runs))], np.int64)
    votes = count_votes(owner, columns[1::2] - columns[::2], mask, core, labels)
    by_frame: list[list[Component]] = [[] for _ in range(num_frames)]
    parts: dict[int, Component] = {}
    for index, (row, first, last) in zip(owner.tolist(), runs, strict=True):
        if index not in parts:
            parts[index] = Component([], 0, votes[index])
            by_frame[row // height].append(parts[index])
        parts[index].runs.append((row % height, first, last))
        parts[index].area += last - first
    return by_frame


def count_votes(
    owner: np.ndarray, lengths: np.ndarray, mask: np.ndarray, core: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Count the pixels of each known color in every component, without its outline unless it has no interior."""
    component = np.repeat(owner, lengths)  # runs are in the order of the mask's pixels
    label, is_core = labels[mask], core[mask]

    def count(chosen: np.ndarray) -> np.ndarray:
        flat = component[chosen] * len(COLORS) + label[chosen]
        return np.bincount(flat, minlength=len(owner) * len(COLORS)).reshape(-1, len(COLORS))

    inner, every = count(is_core & (label >= 0)), count(label >= 0)
    return np.where(inner.any(1, keepdims=True), inner, every)


def join_across_border(parts: list[Component], size: tuple[int, ...], *, min_area: float) -> list[Component]:
    """Join parts that touch across opposite borders, unless both are large and have different colors."""
    height, width = size
    joined = list(parts)
    for edge_of in (
        lambda part: ({r for r, a, _ in part.runs if a == 0}, {r for r, _, b in part.runs if b == width}),
        lambda part: (
            {c for r, a, b in part.runs if r == 0 for c in range(a, b)},
            {c for r, a, b in part.runs if r == height - 1 for c in range(a, b)},
        ),
    ):
        touching = [(part, *edge_of(part)) for part in joined]
        low = [(part, cells) for part, cells, _ in touching if cells]
        high = [(part, cells) for part, _, cells in touching if cells]
        for first, first_cells in low:
            for second, second_cells in high:
                if first is second or not (first_cells & second_cells):
                    continue
                if first not in joined or second not in joined:
                    continue
                is_same = first.votes.argmax() == second.votes.argmax()
                if is_same or min(first.area, second.area) < min_area:
                    larger, smaller = (first, second) if first.area >= second.area else (second, first)
                    larger.runs.extend(smaller.runs)
                    larger.area += smaller.area
                    larger.votes = larger.votes + smaller.votes
                    joined.remove(smaller)
    return joined


def group_colors(by_frame: list[list[Component]]) -> list[tuple[int, ...]]:
    """Return the colors of each object, by total area. Colors that rarely occur together belong to one object."""
    area = np.zeros((len(by_frame), len(COLORS)))
    minor = np.zeros_like(area)
    for index, parts in enumerate(by_frame):
        for part in parts:
            winner = int(part.votes.argmax())
            area[index, winner] += part.area
            share = part.votes / max(1, part.votes.sum())
            share[winner] = 0.0
            minor[index] += np.where(share >= TOUCHING_SHARE, share * part.area, 0.0)
    # a color inside another's component is a touching object, or a soft edge if it is never separate
    stands_alone = (area > 0).mean(0) >= LEAST_ALONE
    seen = (area > 0) | ((minor > 0) & stands_alone)
    groups: list[list[int]] = []
    for color in np.argsort(-area.sum(0)).tolist():
        frames = seen[:, color]
        if not frames.any():
            continue
        for group in groups:
            together = (frames & seen[:, group].any(1)).sum()
            if together < SAME_OBJECT_OVERLAP * frames.sum():
                group.append(color)
                break
        else:
            if frames.sum() >= MIN_PRESENCE * len(by_frame):
                groups.append([color])
    return [tuple(group) for group in groups]


def collect_blob(
    colors: tuple[int, ...],
    groups: list[tuple[int, ...]],
    by_frame: list[list[Component]],
    labels: np.ndarray,
) -> Blob:
    """Collect the mask of one object in every frame: its largest component, divided by color where objects touch."""
    others = [color for group in groups if group != colors for color in group]
    frames, masks = [], []
    for index, parts in enumerate(by_frame):
        own = [part for part in parts if part.votes[list(colors)].sum() > TOUCHING_SHARE * part.votes.sum()]
        if not own:
            continue
        part = max(own, key=lambda part: (int(part.votes[list(colors)].sum()), part.area))
        mask = np.zeros(labels.shape[1:], bool)
        for row, first, last in part.runs:
            mask[row, first:last] = True
        if others and part.votes[others].sum() > TOUCHING_SHARE * part.votes.sum():
            mask &= np.isin(labels[index], colors)
        frames.append(index)
        masks.append(mask)
    return Blob(colors, np.array(frames, int), np.array(masks, bool).reshape(-1, *labels.shape[1:]))


def nearest_color(pixels_N3: np.ndarray) -> np.ndarray:
    """Return for each uint8 color the index of the nearest known one, int8, or -1 if none is near."""
    shift = 8 - TABLE_BITS
    red, green, blue = (pixels_N3[..., i].astype(np.int32) >> shift for i in range(3))
    return color_table()[(red << 2 * TABLE_BITS) | (green << TABLE_BITS) | blue]


@lru_cache(maxsize=1)
def color_table() -> np.ndarray:
    """Return the table of `nearest_color` for every coarse color."""
    levels = (np.arange(2**TABLE_BITS) + 0.5) * 2 ** (8 - TABLE_BITS)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    known = to_lab(np.array(list(COLORS.values()), float))
    distance = np.sqrt(((to_lab(grid)[:, None] - known) ** 2).sum(-1))
    return np.where(distance.min(1) < UNKNOWN_COLOR, distance.argmin(1), -1).astype(np.int8)


def to_lab(rgb_N3: np.ndarray) -> np.ndarray:
    """Convert sRGB in [0, 255] to CIELAB (D65), with lightness scaled down because hue identifies a color better."""
    value = rgb_N3 / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lightness = 116 * f[:, 1] - 16
    a, b = 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])
    return np.stack([LIGHTNESS_WEIGHT * lightness, a, b], -1)
