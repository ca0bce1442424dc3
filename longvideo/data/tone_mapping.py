"""Convert HDR pictures (PQ and HLG, ITU-R BT.2100-2) to SDR with the primaries of BT.709 and the curve of sRGB.

Light is measured relative to reference white, which is 203 cd/m2 in PQ and the signal 0.75 in HLG (ITU-R BT.2408-7,
table 1). HLG is converted from the light of the scene, so without the display's gamma, as SDR cameras also leave that
to the display. Light up to `KNEE` keeps its value, so 18 % gray is 118 of 255. Brighter light is compressed toward 1 by
an exponential curve with the same slope at the knee, so reference white is 252 and highlights are the three values
above it. All channels of a pixel are scaled by one factor, which keeps its hue.
"""

from __future__ import annotations

from functools import cache

import numpy as np

PQ, HLG = "PQ", "HLG"
TRANSFERS = {16: PQ, 18: HLG}
"""Transfer characteristics with these numbers of ITU-T H.273 are HDR."""
BT2020_PRIMARIES = 9
PQ_WHITE = 203.0
HLG_WHITE = 0.75
KNEE = 0.92
LEVELS = 2**16
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
"""Matrix of ITU-R BT.2087-0, annex 2 step 2, inverted: linear RGB of BT.2020 to linear RGB of BT.709."""


def to_sdr(signal_HWC: np.ndarray, transfer: str, *, wide: bool) -> np.ndarray:
    """Return uint8 [H, W, 3] of sRGB.

    signal_HWC: uint16 [H, W, 3] of nonlinear RGB at full range. transfer: PQ or HLG. wide: whether the primaries are
    those of BT.2020, and not those of BT.709.
    """
    light_HWC = _light(transfer)[signal_HWC]
    if wide:
        light_HWC = light_HWC @ BT2020_TO_BT709.T
    light_HWC = light_HWC.clip(0)
    peak_HW1 = light_HWC.max(axis=-1, keepdims=True)
    mapped_HW1 = np.where(peak_HW1 > KNEE, 1 - (1 - KNEE) * np.exp((KNEE - peak_HW1) / (1 - KNEE)), peak_HW1)
    light_HWC *= mapped_HW1 / np.maximum(peak_HW1, np.finfo(np.float32).tiny)
    return _srgb()[np.rint(light_HWC * (LEVELS - 1)).astype(np.uint16)]


@cache
def _light(transfer: str) -> np.ndarray:
    """Return linear light relative to reference white for each 16-bit signal."""
    signal = np.arange(LEVELS) / (LEVELS - 1)
    light = pq_light(signal) / PQ_WHITE if transfer == PQ else hlg_light(signal) / hlg_light(np.array(HLG_WHITE))
    return light.astype(np.float32)


def pq_light(signal: np.ndarray) -> np.ndarray:
    """Return cd/m2 of a PQ signal in 0..1 (BT.2100-2, table 4, EOTF)."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = signal ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_light(signal: np.ndarray) -> np.ndarray:
    """Return scene light in 0..1 of an HLG signal in 0..1 (BT.2100-2, table 5, inverse OETF)."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


@cache
def _srgb() -> np.ndarray:
    """Return the 8-bit sRGB value (IEC 61966-2-1) of each 16-bit linear value."""
    light = np.arange(LEVELS) / (LEVELS - 1)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255).astype(np.uint8)
