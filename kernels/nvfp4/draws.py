"""Random numbers as a function of a seed and an index, computed on the device of the seed.

A `torch.Generator` on a GPU takes its seed from the host, so the host would wait for the device, and a CUDA graph would
repeat its numbers. Here a number is a hash of its index and the seed: two rounds of multiplications and shifts of 32
bits with the constants of "lowbias32" (C. Wellons, Hash Function Prospector, public domain).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIXERS = (0x7FEB352D, 0x846CA68B - 2**32)  # the second one as a signed number of 32 bits
STREAM_STEP = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio, as a signed number
MANTISSA_BITS = 24


def uniform(seed: Tensor, shape: torch.Size, *, stream: int = 0) -> Tensor:
    """Return numbers in [0, 1), float32, each a multiple of 2^-24.

    seed: int64 scalar; its device is that of the result. stream: number that separates uses of one seed.
    Raises ValueError for shapes with 2^31 values or more, whose index a hash of 32 bits cannot hold.
    """
    bits = _bits(seed, math.prod(shape), stream)
    return (_shifted(bits, 32 - MANTISSA_BITS).float() * 2.0**-MANTISSA_BITS).view(shape)


def signs(seed: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """Return a vector of numbers that are 1 or -1, float32. seed, stream: as in `uniform`."""
    return 1.0 - 2.0 * (_bits(seed, count, stream) & 1).float()


def _bits(seed: Tensor, count: int, stream: int) -> Tensor:
    """Return numbers of 32 random bits, int32 [count]."""
    if count >= 2**31:
        raise ValueError(f"cannot draw {count} numbers at once; expected fewer than 2^31")
    low, high = seed.reshape(1).view(torch.int32).unbind()
    first = _mix(low ^ _mix(high + STREAM_STEP * (stream + 1)))
    second = _mix(first + STREAM_STEP)
    index = torch.arange(count, dtype=torch.int32, device=seed.device)
    # two keys: streams that were shifted copies of each other after the first round differ after the second
    return _mix(_mix(index + first) ^ second)


def _mix(x: Tensor) -> Tensor:
    """Return a permutation of the numbers of 32 bits in which every bit depends on every bit."""
    x = (x ^ _shifted(x, 16)) * MIXERS[0]
    x = (x ^ _shifted(x, 15)) * MIXERS[1]
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros; torch's shift of a signed number repeats the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
