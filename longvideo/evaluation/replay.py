"""Record the passes of a roll-out, and run them again on the same inputs with other layers in the model.

Shapes: B batch with the copies of guidance, C channels, T latent frames of a chunk, H W latent size, P texts, J text
positions, D text width.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longvideo.flow.unipc import UniPC
from longvideo.model.conditioning import Conditioning
from longvideo.rollout import CachedTransformer, Denoiser, branches, rollout

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.model.spec import ChunkSpec
    from longvideo.model.transformer import CausalTransformer, TextContext


@dataclass(frozen=True)
class RecordedStep:
    """One pass of a model over noisy latents.

    sigma_BT: noise level that the model received. velocity_BCTHW: result. keep: whether later chunks attend to its keys
    and values.
    """

    latents_BCTHW: Tensor
    sigma_BT: Tensor
    velocity_BCTHW: Tensor
    keep: bool


@dataclass
class RecordedChunk:
    """The passes of one chunk. clean_BCTHW: latents of the clean pass; None without one."""

    steps: list[RecordedStep] = field(default_factory=list)
    clean_BCTHW: Tensor | None = None

    def store(self, denoiser: Denoiser) -> None:
        """Run the pass to whose keys and values later chunks attend. The last chunk of a roll-out may have none."""
        if self.clean_BCTHW is not None:
            denoiser.fill(self.clean_BCTHW)
        elif self.steps[-1].keep:
            denoiser.velocity(self.steps[-1].latents_BCTHW, self.steps[-1].sigma_BT, keep=True)


@dataclass(frozen=True)
class Recording:
    """The passes of one video of one prompt.

    features_PJD: output of the text encoder for the prompt and the negative prompt. rows_B: its row for each copy.
    """

    features_PJD: Tensor
    rows_B: Tensor
    chunks: list[RecordedChunk]


class RecordingDenoiser:
    """A `Denoiser` that records the passes of another one."""

    def __init__(self, inner: Denoiser) -> None:
        self.device, self.latent_shape, self.spec = inner.device, inner.latent_shape, inner.spec
        self.chunks: list[RecordedChunk] = []
        self._inner = inner

    def reset(self) -> None:
        self._inner.reset()

    def begin(self, index: int, *, shot: int, text: TextContext) -> None:
        self.chunks.append(RecordedChunk())
        self._inner.begin(index, shot=shot, text=text)

    def velocity(self, latents_BCTHW: Tensor, sigma_BT: Tensor, *, keep: bool = False) -> Tensor:
        velocity = self._inner.velocity(latents_BCTHW, sigma_BT, keep=keep)
        self.chunks[-1].steps.append(RecordedStep(latents_BCTHW, sigma_BT, velocity, keep))
        return velocity

    def fill(self, latents_BCTHW: Tensor) -> None:
        self.chunks[-1].clean_BCTHW = latents_BCTHW
        self._inner.fill(latents_BCTHW)

    def commit(self, *, cut: bool = False) -> None:
        self._inner.commit(cut=cut)


@torch.inference_mode()
def record(
    model: CausalTransformer,
    spec: ChunkSpec,
    settings: ModelSettings,
    *,
    features_PJD: Tensor,
    num_chunks: int,
    seed: int,
) -> Recording:
    """Roll out one video and return its passes.

    settings: steps, shift, guidance and clean pass of the roll-out. features_PJD: features of the prompt, and of the
    negative prompt in the last row. seed: seed of the noise.
    """
    first, last = (torch.tensor([row], device=features_PJD.device) for row in (0, len(features_PJD) - 1))
    text = model.encode_text(features_PJD)
    copies = branches(settings.guidance)
    denoiser = RecordingDenoiser(CachedTransformer(model, spec, batch=copies))
    for _ in rollout(
        denoiser,
        [Conditioning(text=text, prompt_index=first, negative_index=last)] * num_chunks,
        solver=UniPC(settings.steps, settings.shift),
        generators=[torch.Generator().manual_seed(seed)],
        guidance=settings.guidance,
        clean_pass=settings.clean_pass,
    ):
        pass
    return Recording(features_PJD, torch.cat((first, last)[:copies]), denoiser.chunks)


@torch.inference_mode()
def replay(
    model: CausalTransformer,
    spec: ChunkSpec,
    recording: Recording,
    *,
    in_steps: Mapping[str, nn.Module],
    in_clean_pass: Mapping[str, nn.Module],
) -> list[list[Tensor]]:
    """Run the passes of a recording again on their inputs; return the velocities of each step of each chunk.

    in_steps, in_clean_pass: layers that replace those of the model, by name, in the steps, and in the passes to whose
    keys and values later chunks attend. The text is encoded with the same layers.
    """

    def begin(index: int) -> None:
        text = model.encode_text(recording.features_PJD).select(recording.rows_B)
        denoiser.begin(index, shot=0, text=text)

    denoiser = CachedTransformer(model, spec, batch=len(recording.rows_B))
    velocities: list[list[Tensor]] = []
    for index, chunk in enumerate(recording.chunks):
        with replaced(model, in_steps):
            begin(index)
            velocities.append([denoiser.velocity(step.latents_BCTHW, step.sigma_BT) for step in chunk.steps])
        with replaced(model, in_clean_pass):
            begin(index)
            chunk.store(denoiser)
        denoiser.commit()
    return velocities


@contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Generator[None]:
    """Replace submodules of a model, by name, inside a block of code."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in before.items():
            model.set_submodule(name, layer)
