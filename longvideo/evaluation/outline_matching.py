"""Determine the shape and the angle of an object from its patch in polar coordinates.

Around the centroid a rotation is a shift along the angle, and dividing radii by sqrt(area / pi) removes the size.
Therefore one correlation by FFT tests all angles. N patches, R radii, A angles, S shapes, V edge widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from longvideo.shapeworld.geometry import OUTLINES, outline_row, signed_distance
from longvideo.shapeworld.world import SHAPES, SIZES

NUM_RADII = 22
NUM_ANGLES = 96
MAX_RADIUS = 1.85  # in sqrt(area / pi): the tip of a triangle is at 1.56
EDGE_WIDTHS = (1.5, 4.0)  # world units: as rendered, and blurred


@dataclass(frozen=True)
class Match:
    """Correlation in [-1, 1] of each patch with each shape, and angle in radians (clockwise, modulo the symmetry)."""

    score_NS: np.ndarray
    angle_NS: np.ndarray


def match_outlines(soft_NPP: np.ndarray, center_N2: np.ndarray, area_N: np.ndarray) -> Match:
    """Compare coverage patches with all shapes. center_N2: (y, x) in pixels of the patch. area_N: pixels."""
    polar = sample_polar(soft_NPP, center_N2, np.sqrt(area_N / math.pi))
    weight = polar_weight()
    polar = polar - (polar * weight).sum((1, 2), keepdims=True)
    norm = np.sqrt((polar**2 * weight).sum((1, 2)))
    templates = outline_spectra()
    spectrum = np.fft.rfft(polar * weight, axis=-1)
    product = np.einsum("nrf,svrf->nsvf", spectrum, templates.conj())
    correlation = np.fft.irfft(product, n=NUM_ANGLES, axis=-1) / np.maximum(norm, 1e-6)[:, None, None, None]
    best = correlation.max(-1).argmax(-1)  # edge width
    rows, shapes = np.ogrid[: len(polar), : len(SHAPES)]
    along = correlation[rows, shapes, best]
    return Match(along.max(-1), refine_peak(along))


def sample_polar(patch_NPP: np.ndarray, center_N2: np.ndarray, unit_N: np.ndarray) -> np.ndarray:
    """Sample patches bilinearly on rings around their centers: [N, R, A]."""
    radius = ((np.arange(NUM_RADII) + 0.5) / NUM_RADII * MAX_RADIUS)[:, None]
    angle = np.arange(NUM_ANGLES) / NUM_ANGLES * 2 * math.pi
    side = patch_NPP.shape[1]
    offset = unit_N[:, None, None]
    y = np.clip(center_N2[:, :1, None] + offset * radius * np.sin(angle), 0, side - 1.001)
    x = np.clip(center_N2[:, 1:, None] + offset * radius * np.cos(angle), 0, side - 1.001)
    y0, x0 = y.astype(np.int32), x.astype(np.int32)
    dy, dx = (y - y0).astype(np.float32), (x - x0).astype(np.float32)
    flat = patch_NPP.reshape(-1)
    corner = np.arange(len(patch_NPP), dtype=np.int32)[:, None, None] * side * side + y0 * side + x0
    top = flat[corner] * (1 - dx) + flat[corner + 1] * dx
    bottom = flat[corner + side] * (1 - dx) + flat[corner + side + 1] * dx
    return top * (1 - dy) + bottom * dy


def refine_peak(correlation_NSA: np.ndarray) -> np.ndarray:
    """Return the angle of the highest correlation, refined between samples by a parabola."""
    peak = correlation_NSA.argmax(-1)[..., None]
    left, middle, right = (
        np.take_along_axis(correlation_NSA, (peak + step) % NUM_ANGLES, -1)[..., 0] for step in (-1, 0, 1)
    )
    bend = left - 2 * middle + right
    step = np.where(bend < -1e-9, 0.5 * (left - right) / np.minimum(bend, -1e-9), 0.0)
    return (peak[..., 0] + step) * (2 * math.pi / NUM_ANGLES)


def unit_area(shape: str) -> float:
    """Return the area of a shape of nominal radius 1."""
    return float(outline_areas()[SHAPES.index(shape)])


def fold_angle(shape: str) -> float:
    """Return the angle in radians after which a rotated shape looks the same."""
    return 2 * math.pi / OUTLINES[shape].folds


@lru_cache(maxsize=1)
def outline_areas() -> np.ndarray:
    """Return the area of every shape of radius 1, measured on a fine grid."""
    axis = (torch.arange(600) + 0.5) / 600 * 4 - 2
    inside = outline_distance(axis[None, None, None, :], axis[None, None, :, None], radius=torch.ones(len(SHAPES))) < 0
    return inside.float().mean((1, 2, 3)).numpy() * 16.0


@lru_cache(maxsize=1)
def outline_spectra() -> np.ndarray:
    """Return the spectra along the angle of all shapes, with weighted mean 0 and norm 1: [S, V, R, A // 2 + 1]."""
    radius = ((torch.arange(NUM_RADII) + 0.5) / NUM_RADII * MAX_RADIUS)[:, None]
    angle = torch.arange(NUM_ANGLES) / NUM_ANGLES * 2 * math.pi
    x, y = (radius * torch.cos(angle))[None, None], (radius * torch.sin(angle))[None, None]
    nominal = torch.from_numpy(np.sqrt(math.pi / outline_areas())).float()  # its radius when sqrt(area / pi) is 1
    distance = outline_distance(x, y, radius=nominal)[:, 0]
    drawn = min(SIZES.values())
    soft = [(0.5 - distance * drawn / (nominal[:, None, None] * width)).clamp(0, 1) for width in EDGE_WIDTHS]
    polar = torch.stack(soft, 1).numpy()
    weight = polar_weight()
    polar = polar - (polar * weight).sum((2, 3), keepdims=True)
    polar /= np.sqrt((polar**2 * weight).sum((2, 3), keepdims=True))
    return np.fft.rfft(polar, axis=-1)


def outline_distance(x: torch.Tensor, y: torch.Tensor, *, radius: torch.Tensor) -> torch.Tensor:
    """Return the signed distance to every upright shape: [S, 1, H, W]."""
    outlines = torch.tensor([outline_row(shape) for shape in SHAPES])
    column = radius[:, None, None, None]
    return signed_distance(x, y, outline_BF=outlines, radius=column, angle=torch.zeros_like(column))


@lru_cache(maxsize=1)
def polar_weight() -> np.ndarray:
    """Return the area of a polar sample at each radius, [R, 1]; the areas of all samples add up to 1."""
    radius = np.arange(NUM_RADII) + 0.5
    return (radius / radius.sum() / NUM_ANGLES)[:, None].astype(np.float32)
