"""Compare what the fast path computes with the plain path, before anything is timed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.flow.unipc import UniPC
from longvideo.model.cache import CACHES
from longvideo.model.conditioning import Conditioning
from longvideo.pixels import from_uint8
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.rollout import CachedTransformer, Denoiser, branches, rollout

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.infer.generation import Models, Stages
    from longvideo.model.transformer import TextContext
    from longvideo.streaming.transformer import StreamingTransformer

PROMPT = "a red ball bounces"
COMPARED_CHUNKS = 2
COMPARED_LATENTS = 2
VELOCITY_BOUNDS = {"bf16": 2.5e-2, "nvfp4-weights": 2.5e-2, "fp8": 0.1, "nvfp4": 0.15, "nvfp4-te": 0.15}
"""Largest relative error of velocities by precision. The paths round intermediate values in different places."""
FP8_ATTENTION_BOUND = 0.15
"""Largest relative error of velocities with FP8 attention. The plain path has attention in the model's data type."""
PIXEL_BOUND, FP8_PIXEL_BOUND = 3e-2, 0.15
"""Largest relative error of pixels of an exact decoder and of one in FP8, whose plain path is in bf16."""


def compare_stages(models: Models, stages: Stages) -> dict[str, float]:
    """Return the relative errors of velocities and pixels against the plain path, with the steps and the guidance of
    the settings.

    Raises UserError, with the numbers, where an error exceeds its bound.
    """
    errors = {
        "velocities": _velocity_error(models, stages.denoiser),
        "pixels": _pixel_error(models, stages),
    }
    pixel_bound = FP8_PIXEL_BOUND if models.formats.decoder in FP8_FORMATS else PIXEL_BOUND
    _check_bounds(errors, {"velocities": _velocity_bound(models), "pixels": pixel_bound})
    return errors


def compare_velocities(models: Models, denoiser: StreamingTransformer) -> float:
    """Return the relative error of velocities against the plain path, without guidance; raises as `compare_stages`."""
    error = _velocity_error(replace(models, settings=replace(models.settings, guidance=1.0)), denoiser)
    _check_bounds({"velocities": error}, {"velocities": _velocity_bound(models)})
    return error


def _velocity_error(models: Models, fast: StreamingTransformer) -> float:
    """Return the relative error of the velocities at the latents that the plain path visits.

    The latents of two whole solutions are not compared: every step multiplies the rounding errors of earlier steps.
    """
    settings = models.settings
    kv_cache, num_chunks = models.formats.kv_cache, COMPARED_CHUNKS
    if kv_cache == "nvfp4-mixed":
        num_chunks += models.spec.sink_chunks + 1  # until a chunk is read from its 4-bit form
    plain = CachedTransformer(
        models.transformer, models.spec, batch=branches(settings.guidance), cache_type=CACHES[kv_cache]
    )
    recorder = _Recorder(plain)
    features, rows = models.text_encoder.encode([PROMPT, ""])
    rows = rows.to(models.device)
    with torch.inference_mode():
        text = models.transformer.encode_text(features.to(models.device))
    chunks = rollout(
        recorder,
        [Conditioning(text, rows[:1], rows[1:])] * num_chunks,
        solver=UniPC(settings.steps, settings.shift),
        generators=[torch.Generator().manual_seed(0)],
        guidance=settings.guidance,
        clean_pass=settings.clean_pass,
    )
    assert len(list(chunks)) == num_chunks
    with torch.inference_mode():
        velocities = [velocity for call in recorder.calls if (velocity := call(fast)) is not None]
    fast.reset()
    return _relative_error(torch.cat(velocities), torch.cat(recorder.velocities))


def _pixel_error(models: Models, stages: Stages) -> float:
    decoder = stages.decoder
    assert decoder is not None
    scale, (_, *shape) = models.decoder.config.scale_factor_temporal, stages.denoiser.latent_shape
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))[:, :, :COMPARED_LATENTS]
    latents = latents.to(models.decode_device)
    pixels = torch.from_numpy(decoder.decode(latents, 1 + scale * (COMPARED_LATENTS - 1)))
    decoder.reset()
    expected = models.decoder.plain(latents)
    return _relative_error(from_uint8(pixels), from_uint8(expected.cpu()))


def _velocity_bound(models: Models) -> float:
    if models.formats.attention in FP8_FORMATS:
        return FP8_ATTENTION_BOUND
    return VELOCITY_BOUNDS[models.formats.precision_of(packed=False).removesuffix("-emulated")]


def _check_bounds(errors: dict[str, float], bounds: dict[str, float]) -> None:
    for name, bound in bounds.items():
        if not errors[name] <= bound:
            raise UserError(
                f"the check failed, so nothing is timed: {name} of the fast path differ from the plain path's by"
                f" {errors[name]:.2e}; expected at most {bound:.1e}; please report this with `longvideo doctor --json`"
            )


def _relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


class _Recorder:
    """A denoiser that passes each call on to another one, and records the calls and the velocities they return.

    calls: functions that repeat a call on any denoiser.
    """

    def __init__(self, inner: Denoiser) -> None:
        self._inner = inner
        self.device, self.latent_shape, self.spec = inner.device, inner.latent_shape, inner.spec
        self.calls: list[Callable[[Denoiser], Tensor | None]] = []
        self.velocities: list[Tensor] = []

    def reset(self) -> None:
        self._record(lambda denoiser: denoiser.reset())

    def begin(self, index: int, *, shot: int, text: TextContext) -> None:
        self._record(lambda denoiser: denoiser.begin(index, shot=shot, text=text))

    def velocity(self, latents_BCTHW: Tensor, sigma_BT: Tensor, *, keep: bool = False) -> Tensor:
        latents, sigma = latents_BCTHW.clone(), sigma_BT.clone()
        velocity = self._record(lambda denoiser: denoiser.velocity(latents, sigma, keep=keep))
        assert velocity is not None
        self.velocities.append(velocity)
        return velocity

    def fill(self, latents_BCTHW: Tensor) -> None:
        latents = latents_BCTHW.clone()
        self._record(lambda denoiser: denoiser.fill(latents))

    def commit(self, *, cut: bool = False) -> None:
        self._record(lambda denoiser: denoiser.commit(cut=cut))

    def _record(self, call: Callable[[Denoiser], Tensor | None]) -> Tensor | None:
        self.calls.append(call)
        return call(self._inner)
