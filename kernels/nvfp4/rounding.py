"""Rounding to NVFP4 in plain torch: group scales in E4M3 and values in E2M1, by every rule.

The order of all roundings and of the sums of errors is fixed, and kernels repeat it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvideo.kernels.nvfp4.format import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_TINY,
    GROUP,
    Rule,
    check_groups,
)

LANES = 8
"""Number of float32 values in a register of the CPU, which fixes the order of the adaptive rules' sums."""
AMAX_SHIFT = 2.0**-11
"""Factor that keeps code x group scale x largest magnitude below the largest magnitude."""
EXPONENT_BITS = 0x7F800000
"""Mask of the exponent of a float32 number."""
ANCHOR = 1.5 * 2.0**22
"""Factor of a power of two that gives a float32 number whose last bit is worth half of that power."""


def round_to_groups(
    x: Tensor,
    rule: Rule,
    tile_rows: int,
    amax: Tensor | None,
    generator: torch.Generator | None,
    name: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return E2M1 values [..., G, 16] in float32, E4M3 scales [..., G] and the tensor scale.

    Arguments and errors are those of `reference.quantize`.
    """
    check_groups(x.shape, tile_rows=tile_rows)
    if generator is not None and rule.is_adaptive:
        raise ValueError(
            f"rule {rule.value!r} chooses a scale after rounding, which biases stochastic rounding; use static6"
        )
    if name is not None and not torch.isfinite(x).all():
        raise ValueError(f"{name} {list(x.shape)} holds NaN or infinity; expected finite values")
    amax = (largest_magnitude(x) if amax is None else amax.float()).clamp_min(rule.smallest_amax)
    groups = x.float().unflatten(-1, (-1, GROUP))
    group_amax = groups.abs().amax(-1)
    if tile_rows == GROUP:
        group_amax = group_amax.unflatten(0, (-1, GROUP)).amax(1).repeat_interleave(GROUP, 0)
    tensor_scale = tensor_scale_of(amax, rule)
    if rule.is_adaptive:
        values, scales = _round_adaptively(groups, group_amax, amax, rule, tile_rows)
    else:
        values, scales = _round_statically(groups, group_amax, tensor_scale, rule, generator)
    return values, scales, tensor_scale


def _round_statically(
    groups: Tensor, group_amax: Tensor, tensor_scale: Tensor, rule: Rule, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    exact_scale = _divide(group_amax, 4.0 if rule is Rule.STATIC4 else E2M1_MAX) / tensor_scale
    # as in torchao, no group scale is below the normal numbers
    scales = _to_e4m3(exact_scale.clamp(E4M3_TINY, E4M3_MAX), round_up=generator is not None)
    values = _scaled(groups, tensor_scale.reciprocal() / scales.float())
    return to_nearest(values) if generator is None else _stochastically(values, generator), scales


def _round_adaptively(
    groups: Tensor, group_amax: Tensor, amax: Tensor, rule: Rule, tile_rows: int
) -> tuple[Tensor, Tensor]:
    """Round with the largest magnitude of a group at 6 and at 4, and use the result with the lower error."""
    encoding_scale = torch.full_like(amax, rule.largest_product) / amax
    decoding_scale = encoding_scale.reciprocal()
    exact_scale = _divide(group_amax, E2M1_MAX) * encoding_scale
    candidates = []
    for candidate_scale in (exact_scale, exact_scale * 1.5):
        scales = _to_e4m3(candidate_scale.clamp(0.0, E4M3_MAX), round_up=False)
        # a group whose scale rounds to zero is zero
        factor = torch.where(scales.float() > 0, (decoding_scale * scales.float()).reciprocal(), 0.0)
        values = to_nearest(_scaled(groups, factor))
        candidates.append((values, scales, _error(groups, values, scales, amax, rule, tile_rows)))
    (to_six, scales_to_six, error_to_six), (to_four, scales_to_four, error_to_four) = candidates
    better = error_to_four < error_to_six
    values = torch.where(better.unsqueeze(-1), to_four, to_six)
    scales = torch.where(better, scales_to_four.view(torch.uint8), scales_to_six.view(torch.uint8))
    return values, scales.view(torch.float8_e4m3fn)


def largest_magnitude(x: Tensor) -> Tensor:
    """Return max |x| as a float32 scalar; NaN if x holds NaN."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def tensor_scale_of(amax: Tensor, rule: Rule) -> Tensor:
    """Return the tensor scale of a tensor with this largest magnitude."""
    return _divide(amax.float().clamp_min(rule.smallest_amax), rule.largest_product)


def _divide(x: Tensor, by: float) -> Tensor:
    """Divide by the rules of IEEE 754 on every device; for a Python number, CUDA multiplies by a rounded reciprocal."""
    return x / torch.full((), by, device=x.device)


def _scaled(groups: Tensor, factor: Tensor) -> Tensor:
    return (groups * factor.unsqueeze(-1)).clamp(-E2M1_MAX, E2M1_MAX)


def _error(groups: Tensor, values: Tensor, scales: Tensor, amax: Tensor, rule: Rule, tile_rows: int) -> Tensor:
    """Return the error of every group, or with tiles the sum of the errors of its tile.

    A value is `code x scale x amax / (6 x 256)`, rounded after the second product and after the division. The power of
    two in the divisor is applied first, which changes no bit and keeps the product from overflowing.
    """
    product = values * scales.float().unsqueeze(-1) * (amax * AMAX_SHIFT).unsqueeze(-1)
    error = _divide(product, rule.largest_product * AMAX_SHIFT) - groups
    if rule is Rule.ADAPTIVE_MAX:
        worst = error.abs().amax(-1)
        return worst if tile_rows == 1 else worst.unflatten(0, (-1, GROUP)).amax(1).repeat_interleave(GROUP, 0)
    error = error.square() if rule is Rule.ADAPTIVE else error.abs()
    return _sum_of_groups(error) if tile_rows == 1 else _sum_of_tiles(error).repeat_interleave(GROUP, 0)


def _sum_of_groups(x: Tensor) -> Tensor:
    """Sum 16 numbers of the last dimension as a CPU with registers of eight does: the halves, then their eight sums."""
    first, second = x.unflatten(-1, (2, LANES)).unbind(-2)
    return _sum_in_order(first + second)


def _sum_of_tiles(x_RG16: Tensor) -> Tensor:
    """Sum tiles of 16 x 16 as a CPU with four registers of eight does: one for each half of even and of odd rows."""
    halves_TNPGHL = x_RG16.unflatten(-1, (2, LANES)).unflatten(0, (-1, GROUP // 2, 2))
    total_TPGHL = halves_TNPGHL[:, 0]
    for step in range(1, GROUP // 2):
        total_TPGHL = total_TPGHL + halves_TNPGHL[:, step]
    even_TGHL, odd_TGHL = total_TPGHL.unbind(1)
    total_TGL = even_TGHL[..., 0, :] + even_TGHL[..., 1, :] + odd_TGHL[..., 0, :] + odd_TGHL[..., 1, :]
    return _sum_in_order(total_TGL)


def _sum_in_order(x: Tensor) -> Tensor:
    """Sum the last dimension from the first number to the last."""
    first, *others = x.unbind(-1)
    for other in others:
        first = first + other
    return first


def _to_e4m3(scale: Tensor, *, round_up: bool) -> Tensor:
    """Round a scale in [0, 448] to E4M3, to nearest with ties to even, or up, so that no scaled value exceeds 6."""
    rounded = scale.to(torch.float8_e4m3fn)
    if round_up:
        # positive E4M3 numbers have the order of their bytes
        below = rounded.float() < scale
        rounded = (rounded.view(torch.uint8) + below.to(torch.uint8)).view(torch.float8_e4m3fn)
    return rounded


def to_nearest(x: Tensor) -> Tensor:
    """Round to E2M1, ties to the even code.

    Added to a number whose last bit is worth one step, a magnitude is rounded to whole steps by float32 itself.
    """
    magnitude = x.abs()
    anchor = _octave(magnitude) * ANCHOR
    return torch.copysign((magnitude + anchor) - anchor, x)


def _stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round to one of the two nearest E2M1 values; the probability of the upper one makes the mean exact."""
    magnitude = x.abs()
    step = e2m1_step(magnitude)
    steps = magnitude / step
    lower = torch.floor(steps)
    # not floor(steps + draw): that sum may be rounded up beyond a number that is an E2M1 value already
    up = torch.rand(x.shape, generator=generator, device=x.device) < steps - lower
    return torch.copysign((lower + up) * step, x)


def e2m1_step(magnitude: Tensor) -> Tensor:
    """Return the distance of the two E2M1 numbers around a magnitude, float32."""
    return _octave(magnitude) * 0.5


def _octave(magnitude: Tensor) -> Tensor:
    """Return the power of two at or below a magnitude, at least 1, which is two steps of E2M1."""
    return (magnitude.view(torch.int32) & EXPONENT_BITS).view(torch.float32).clamp_min(1.0)
