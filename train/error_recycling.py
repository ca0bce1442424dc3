"""Recycled prediction errors: errors of the model are stored and added to later inputs, to learn to correct them.

This is the error recycling of Stable Video Infinity (arXiv 2510.09212), chunk by chunk for a causal model. A step is:

    injected = bank.inject(clean, noise, sigma_BQ, step=step)
    noisy = schedule.add_noise(injected.latents, injected.noise, sigma_BT)
    velocity, target = model(injected.context, noisy, ...), schedule.velocity(clean, injected.noise)
    errors = prediction_errors(velocity, target, noisy, clean, sigma_BT)
    bank.add(*errors, sigma_BQ, used_clean=injected.used_clean, step=step)

The target contains the injected noise and the ORIGINAL latents, not the injected ones, so the model learns to return to
the originals. The random numbers of every choice depend only on (seed, step, sample, chunk), with the numbers of sample
and chunk in the global batch and the whole clip, and so not on how a batch is divided over ranks. The entries to choose
from are the rank's own: a rank stores the errors of its own chunks only.

All indices are host integers and all copies are asynchronous, so the host never waits in a step. `inject`, `add` and
everything between them must run on one stream.

Shapes: B samples, C channels, T latent frames, H W latent grid, Q chunks of F frames each, so T = Q F.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from longvideo.checkpoint.tensors import TensorInfo, Weights, read_range
from longvideo.errors import CheckpointError
from longvideo.flow.schedule import expand
from longvideo.train.prediction_errors import noise_bucket
from longvideo.train.recycling_config import DTYPE, ErrorRecyclingConfig
from longvideo.training.objective import seeded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from longvideo.flow.schedule import FlowSchedule


Place: TypeAlias = tuple[int, int]
"""Sample and chunk, both counted within the call."""
Pick: TypeAlias = tuple[Tensor, float]
"""A stored error and its factor."""


@dataclass(frozen=True)
class Injected:
    """Input of a step, [B, C, T, H, W] each. used_clean: whether a sample was to get no error, [B], on the CPU."""

    context: Tensor
    latents: Tensor
    noise: Tensor
    used_clean: Tensor


@dataclass(frozen=True)
class SampleDraw:
    """Numbers from [0, 1), one for each decision about a sample.

    keep: decides whether the errors of a sample without injected errors are stored.
    """

    clean: float
    context: float
    latent: float
    noise: float
    keep: float


@dataclass(frozen=True)
class ChunkDraw:
    """Numbers from [0, 1), one for each choice about a chunk: an entry and a factor of each kind, a slot to replace."""

    context_entry: float
    context_factor: float
    latent_entry: float
    latent_factor: float
    noise_entry: float
    noise_factor: float
    slot: float


class ErrorBank:
    """Errors of the model by noise bucket: bounded, filled by `add`, read by `inject`.

    latent_errors, noise_errors: [buckets, entries, C, F, H, W] bfloat16, allocated once, on the host or on `device`;
    noise_errors is None if the configuration never injects them. A new error replaces a random entry of a full bucket.
    filled: number of entries in each bucket.
    """

    def __init__(
        self,
        config: ErrorRecyclingConfig,
        schedule: FlowSchedule,
        *,
        chunk_shape: tuple[int, int, int, int],
        seed: int,
        device: torch.device,
    ) -> None:
        """chunk_shape: C, F, H, W. device: device that the model is trained on."""
        self.config = config
        self.schedule = schedule
        self.chunk_shape = chunk_shape
        self.seed = seed
        self.generator = torch.Generator()
        self.pinned = config.storage == "host" and device.type == "cuda"
        self.entries = config.entries_within_memory(torch.Size(chunk_shape).numel(), pinned=self.pinned)
        self.errors = torch.zeros(
            (config.kinds, config.buckets, self.entries, *chunk_shape),
            dtype=DTYPE,
            device=device if config.storage == "device" else "cpu",
            pin_memory=self.pinned,
        )
        self.latent_errors = self.errors[0]
        self.noise_errors = self.errors[1] if config.kinds == 2 else None
        self.filled = [0] * config.buckets

    @property
    def nbytes(self) -> int:
        return self.errors.nbytes

    def inject(
        self,
        clean_BCTHW: Tensor,
        noise_BCTHW: Tensor,
        sigma_BQ: Tensor,
        *,
        step: int,
        samples: Sequence[int] | None = None,
        chunks: Sequence[int] | None = None,
        given_BT: Tensor | None = None,
    ) -> Injected:
        """Return context, latents and noise with stored errors added to those of the drawn samples.

        A chunk of the context gets a latent error of any bucket, a chunk of the latents a latent error of the bucket of
        its own noise level, a chunk of the noise a noise error of that bucket; nothing is added while the bucket is
        empty. The target is `schedule.velocity(clean, injected.noise)`, with the clean latents that were given.

        sigma_BQ: noise level of every chunk, on the CPU. samples [B], chunks [Q]: their numbers in the global batch and
        in the whole clip, counted from 0 by default. given_BT: 1 at frames that stay unchanged, such as the image of an
        image-to-video sample.
        """
        buckets_BQ = self._buckets(sigma_BQ, clean_BCTHW)
        samples, chunks = _numbers(samples, chunks, sigma_BQ)
        if step < self.config.warmup_steps:
            used_clean = torch.ones(len(samples), dtype=torch.bool)
            return Injected(clean_BCTHW, clean_BCTHW, noise_BCTHW, used_clean)
        config, used_clean = self.config, []
        context: dict[Place, Pick | None] = {}
        latents: dict[Place, Pick | None] = {}
        noise: dict[Place, Pick | None] = {}
        for b, sample in enumerate(samples):
            of_sample = self._sample_draw(step, sample)
            used_clean.append(of_sample.clean < config.clean_probability)
            if used_clean[-1]:
                continue
            for q, chunk in enumerate(chunks):
                draw, bucket = self._chunk_draw(step, sample, chunk), buckets_BQ[b][q]
                if of_sample.context < config.context_probability:
                    context[b, q] = self._pick_any(draw.context_entry, draw.context_factor)
                if of_sample.latent < config.latent_probability:
                    latents[b, q] = self._pick(self.latent_errors, bucket, draw.latent_entry, draw.latent_factor)
                if self.noise_errors is not None and of_sample.noise < config.noise_probability:
                    noise[b, q] = self._pick(self.noise_errors, bucket, draw.noise_entry, draw.noise_factor)
        return Injected(
            context=self._added(clean_BCTHW, context, given_BT),
            latents=self._added(clean_BCTHW, latents, given_BT),
            noise=self._added(noise_BCTHW, noise, given_BT),
            used_clean=torch.tensor(used_clean),
        )

    @torch.no_grad()
    def add(
        self,
        latent_error_BCTHW: Tensor,
        noise_error_BCTHW: Tensor,
        sigma_BQ: Tensor,
        *,
        used_clean: Tensor,
        step: int,
        samples: Sequence[int] | None = None,
        chunks: Sequence[int] | None = None,
        trained_BQ: Tensor | None = None,
    ) -> None:
        """Store the errors of a step.

        The errors are those of `prediction_errors`, the other arguments those of `inject` and its result. trained_BQ:
        on the CPU, the chunks that have a loss; errors of other chunks mean nothing and are left out. An error that is
        not finite is stored as zeros, so that one bad step spoils no later one.
        """
        buckets_BQ = self._buckets(sigma_BQ, latent_error_BCTHW)
        samples, chunks = _numbers(samples, chunks, sigma_BQ)
        places: dict[tuple[int, int], Place] = {}
        for b, sample in enumerate(samples):
            if not self._keeps(step, sample, bool(used_clean[b])):
                continue
            for q, chunk in enumerate(chunks):
                if trained_BQ is None or trained_BQ[b, q]:
                    bucket = buckets_BQ[b][q]
                    # if two chunks get the same slot, the later one is kept, whatever the order of the copies
                    places[bucket, self._slot(bucket, self._chunk_draw(step, sample, chunk))] = b, q
        both = (latent_error_BCTHW, noise_error_BCTHW)
        for errors, new in zip(self.errors, both[: self.config.kinds], strict=True):
            self._write(errors, new, places)

    def state(self) -> dict[str, Tensor]:
        """Return everything that a later run needs to resume bit for bit, uncopied.

        Waits for copies to the host to end.
        """
        if self.pinned:
            torch.cuda.synchronize()
        return {"errors": self.errors, "filled": torch.tensor(self.filled)}

    def load(self, states: Sequence[Weights], *, rank: int = 0, world: int = 1) -> None:
        """Restore what `state` returned on each rank that wrote a checkpoint.

        With the same number of ranks, each restores its own errors. With another number, errors are divided in turn,
        and those that do not fit into a bucket are left out. Raises CheckpointError for errors of another
        configuration.
        """
        states = [state for state in states if "errors" in state.infos]
        for state in states:
            self._check(state.infos["errors"])
        first, stride = rank, world
        if len(states) == world:
            states, first, stride = [states[rank]], 0, 1
        self.errors.zero_()
        filled = [state.read("filled").tolist() for state in states]
        size = torch.Size(self.chunk_shape).numel()
        for bucket in range(self.config.buckets):
            stored = sorted((number, o) for o, counts in enumerate(filled) for number in range(counts[bucket]))
            own = stored[first::stride][: self.entries]
            self.filled[bucket] = len(own)
            for slot, (number, o) in enumerate(own):
                errors = states[o].tensors["errors"]
                for kind, buckets in enumerate(self.errors):
                    place = (kind * self.config.buckets + bucket) * errors.info.shape[2] + number
                    buckets[bucket, slot] = read_range(errors, place * size, size).view(self.chunk_shape)

    def _check(self, errors: TensorInfo) -> None:
        """Raise CheckpointError unless stored errors have this bank's kinds, buckets and chunks."""
        kinds, buckets, _, *chunk = errors.shape
        if (kinds, buckets, tuple(chunk)) != (self.config.kinds, self.config.buckets, self.chunk_shape):
            expected = [self.config.kinds, self.config.buckets, self.entries, *self.chunk_shape]
            raise CheckpointError(
                f"the checkpoint's errors have shape {list(errors.shape)}; expected {expected}"
                " [kinds, buckets, entries, C, F, H, W]; resume with the recycling settings that it was saved with"
            )

    def _buckets(self, sigma_BQ: Tensor, x_BCTHW: Tensor) -> list[list[int]]:
        batch, channels, frames, height, width = x_BCTHW.shape
        expected = (batch, sigma_BQ.shape[1] * self.chunk_shape[1]), self.chunk_shape
        got = (sigma_BQ.shape[0], frames), (channels, self.chunk_shape[1], height, width)
        if got != expected:
            raise ValueError(
                f"latents are {list(x_BCTHW.shape)} and sigma is {list(sigma_BQ.shape)}; expected [B, C, Q F, H, W] and"
                f" [B, Q] with chunks of {list(self.chunk_shape)} [C, F, H, W]"
            )
        if sigma_BQ.device.type != "cpu":
            raise ValueError(f"sigma is on {sigma_BQ.device}; expected the CPU, because its buckets are host indices")
        return noise_bucket(sigma_BQ, self.config.buckets, shift=self.schedule.shift).tolist()

    def _sample_draw(self, step: int, sample: int) -> SampleDraw:
        return SampleDraw(*self._draw(5, "recycled sample", step, sample))

    def _chunk_draw(self, step: int, sample: int, chunk: int) -> ChunkDraw:
        return ChunkDraw(*self._draw(7, "recycled chunk", step, sample, chunk))

    def _draw(self, count: int, *parts: int | str) -> list[float]:
        generator = seeded(self.generator, self.seed, *parts)
        return torch.rand(count, generator=generator, dtype=torch.float64).tolist()

    def _keeps(self, step: int, sample: int, used_clean: bool) -> bool:
        if not used_clean or step < self.config.warmup_steps:
            return True
        return self._sample_draw(step, sample).keep < self.config.clean_kept

    def _slot(self, bucket: int, draw: ChunkDraw) -> int:
        """Return the next free entry of a bucket, or a random one of a full bucket."""
        if self.filled[bucket] == self.entries:
            return int(draw.slot * self.entries)
        self.filled[bucket] += 1
        return self.filled[bucket] - 1

    def _pick(self, errors: Tensor, bucket: int, entry: float, factor: float) -> Pick | None:
        """Choose one of a bucket's entries, or None if it has none yet."""
        filled = self.filled[bucket]
        return (errors[bucket, int(entry * filled)], self._factor(factor)) if filled else None

    def _pick_any(self, entry: float, factor: float) -> Pick | None:
        """Choose one of all latent errors, all of them equally likely."""
        number = int(entry * sum(self.filled))
        for bucket, filled in enumerate(self.filled):
            if number < filled:
                return self.latent_errors[bucket, number], self._factor(factor)
            number -= filled
        return None

    def _factor(self, draw: float) -> float:
        return 1 + self.config.modulation * (2 * draw - 1)

    def _added(self, x_BCTHW: Tensor, picks: Mapping[Place, Pick | None], given_BT: Tensor | None) -> Tensor:
        """Add the picked errors to their chunks."""
        errors = {place: pick for place, pick in picks.items() if pick is not None}
        if not errors:
            return x_BCTHW
        batch, chunks = x_BCTHW.shape[0], x_BCTHW.shape[2] // self.chunk_shape[1]
        drawn_BQCFHW = torch.zeros((batch, chunks, *self.chunk_shape), dtype=DTYPE, device=x_BCTHW.device)
        _copy((drawn_BQCFHW[place] for place in errors), (error for error, _ in errors.values()))
        factor_BQ = torch.zeros(batch, chunks, dtype=x_BCTHW.dtype)
        for place, (_, factor) in errors.items():
            factor_BQ[place] = factor
        error_BQCFHW = drawn_BQCFHW * _to_device(factor_BQ, x_BCTHW.device)[:, :, None, None, None, None]
        error_BCTHW = error_BQCFHW.transpose(1, 2).flatten(2, 3)
        if given_BT is not None:
            error_BCTHW = error_BCTHW * (1 - expand(given_BT.to(x_BCTHW.dtype)))
        return x_BCTHW + error_BCTHW

    def _write(self, errors: Tensor, new_BCTHW: Tensor, places: Mapping[tuple[int, int], Place]) -> None:
        """Copy chunks (b, q) of the new errors to entries (bucket, slot)."""
        new_BQCFHW = new_BCTHW.unflatten(2, (-1, self.chunk_shape[1])).transpose(1, 2).to(DTYPE)
        finite_BQ = new_BQCFHW.isfinite().flatten(2).all(2)
        new_BQCFHW = torch.where(finite_BQ[:, :, None, None, None, None], new_BQCFHW, 0).contiguous()
        _copy((errors[place] for place in places), (new_BQCFHW[chunk] for chunk in places.values()))


def _numbers(
    samples: Sequence[int] | None, chunks: Sequence[int] | None, sigma_BQ: Tensor
) -> tuple[Sequence[int], Sequence[int]]:
    """Fill in the numbers of samples and chunks that are None, and check the others."""
    batch, count = sigma_BQ.shape
    samples, chunks = samples or range(batch), chunks or range(count)
    if (len(samples), len(chunks)) != (batch, count):
        raise ValueError(
            f"there are {len(samples)} sample and {len(chunks)} chunk numbers; expected {batch} and {count}"
        )
    return samples, chunks


def _copy(to: Iterable[Tensor], source: Iterable[Tensor]) -> None:
    """Copy each tensor into its partner, from host to device or back, without waiting."""
    destinations = list(to)
    if destinations:
        torch._foreach_copy_(destinations, list(source), non_blocking=True)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a new host tensor to the device without waiting."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
