"""Classify the motion of a tracked object. Lengths are in world units, times in seconds; y points down."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LEAST_TRAVEL = 10.0  # range of the center below which an object stays in its place
LEAST_SIDEWAYS = 13.0  # range across the main direction that a straight path may have
DIRECTION_SECONDS = 1.3  # a bouncing object shows its direction for 1.5 s
LEAST_PULSE = 0.22  # (largest - smallest) / median radius; ShapeWorld's pulse has 0.56
LEAST_SPIN = math.radians(75)
SPIN_STEADINESS = 0.85  # share of the turning that a constant rate explains
WAVE_PERIODS = np.linspace(1.8, 6.0, 29)
PHASES = np.arange(24) / 24
CROSSING_PERIODS = np.geomspace(2.2, 20.0, 30)


@dataclass(frozen=True)
class Track:
    """Poses of one object over time: unwrapped center, radius, and angle, unwrapped modulo the shape's symmetry."""

    time: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray | None  # None for round shapes


def read_motion(track: Track) -> str:
    """Return one of MOTIONS."""
    range_x, range_y = spread(track.x), spread(track.y)
    if max(range_x, range_y) < LEAST_TRAVEL:
        return read_motion_in_place(track)
    if range_y < max(LEAST_SIDEWAYS, 0.12 * range_x) and range_y < 0.6 * range_x:
        return "right" if first_displacement(track.time, track.x) > 0 else "left"
    if range_x < max(LEAST_SIDEWAYS, 0.12 * range_y) and range_x < 0.6 * range_y:
        return "down" if first_displacement(track.time, track.y) > 0 else "up"
    orbit_error, turns_clockwise = fit_orbit(track)
    if orbit_error < fit_zigzag(track):
        return "clockwise" if turns_clockwise else "counterclockwise"
    return "zigzag"


def read_motion_in_place(track: Track) -> str:
    """Return "still", "spinning" or "pulsing"."""
    radius = smooth(track.radius)
    if spread(radius) > LEAST_PULSE * float(np.median(radius)):
        return "pulsing"
    if track.angle is not None and len(track.angle) > 2:
        slope, _ = np.polyfit(track.time, track.angle, 1)
        turned = slope * (track.time[-1] - track.time[0])
        explained = np.corrcoef(track.time, track.angle)[0, 1] ** 2 if np.ptp(track.angle) > 1e-6 else 0.0
        if abs(turned) > LEAST_SPIN and explained > SPIN_STEADINESS:
            return "spinning"
    return "still"


def spread(values: np.ndarray) -> float:
    """Return the range without the outermost percents, which exclude errors in single frames."""
    low, high = np.percentile(values, (3, 97))
    return float(high - low)


def smooth(values: np.ndarray) -> np.ndarray:
    """Replace every value by the median of it and its two neighbors."""
    padded = np.concatenate([values[:1], values, values[-1:]])
    return np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def first_displacement(time: np.ndarray, values: np.ndarray) -> float:
    """Return the slope at the start, as the median over pairs, which is robust against errors in a few frames."""
    early = time <= time[0] + DIRECTION_SECONDS
    t, v = time[early], values[early]
    later, sooner = np.triu_indices(len(t), k=max(1, len(t) // 3))[::-1]
    return float(np.median((v[later] - v[sooner]) / (t[later] - t[sooner]))) if len(later) else 0.0


def unwrap(values: np.ndarray, size: float) -> np.ndarray:
    """Remove jumps across the border of a torus of length `size`."""
    return np.unwrap(values, period=size)


def fit_orbit(track: Track) -> tuple[float, bool]:
    """Fit a uniform circular motion; return the mean squared error, and whether it is clockwise.

    Center, radius, phase and period are free. For a given rate w the path is linear in (center_x, center_y, a, b):
    x = center_x + a cos wt - b sin wt, y = center_y + a sin wt + b cos wt; w > 0 is clockwise on the screen.
    """
    target = np.concatenate([track.x, track.y])
    one, zero = np.ones_like(track.time), np.zeros_like(track.time)
    best, sense = math.inf, True
    for period in WAVE_PERIODS:
        for sign in (1.0, -1.0):
            phase = sign * 2 * math.pi * track.time / period
            cos, sin = np.cos(phase), np.sin(phase)
            design = np.stack([[one, zero], [zero, one], [cos, sin], [-sin, cos]]).reshape(4, -1)
            error = residual(design, target)
            if error < best:
                best, sense = error, sign > 0
    return best, sense


def fit_zigzag(track: Track) -> float:
    """Fit a triangle wave to y, and a straight line or a triangle wave to x; return the mean squared error."""
    error_x = min(best_wave(track.time, track.x, CROSSING_PERIODS), line_error(track.time, track.x))
    return (error_x + best_wave(track.time, track.y, WAVE_PERIODS)) / 2


def line_error(time: np.ndarray, values: np.ndarray) -> float:
    """Return the mean squared error of the best straight line."""
    return residual(np.stack([np.ones_like(time), time]), values)


def best_wave(time: np.ndarray, values: np.ndarray, periods: np.ndarray) -> float:
    """Return the mean squared error of the best triangle wave of any amplitude and offset."""
    turns = time / periods[:, None, None] + PHASES[None, :, None]
    wave = np.abs(2 * (turns - np.floor(turns)) - 1)
    wave = wave - wave.mean(-1, keepdims=True)
    centred = values - values.mean()
    explained = (wave @ centred) ** 2 / np.maximum((wave**2).sum(-1), 1e-9)
    return float(((centred**2).sum() - explained.max()) / len(values))


def residual(design_KN: np.ndarray, target_N: np.ndarray) -> float:
    """Return the mean squared error of a linear least squares fit, over both coordinates if they are stacked."""
    gram = design_KN @ design_KN.T + 1e-9 * np.eye(len(design_KN))
    moment = design_KN @ target_N
    return float((target_N @ target_N - moment @ np.linalg.solve(gram, moment)) / len(target_N))
