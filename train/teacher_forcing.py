"""Teacher forcing: predict the velocity of every chunk of a noisy copy, given clean earlier chunks, in one pass.

Shapes: B views, C channels, T latent frames, H W latent grid, Q chunks, S tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from longvideo.flow.schedule import FlowSchedule
from longvideo.model.attention import Blockwise
from longvideo.model.layout import TokenLayout
from longvideo.model.rope import Rope
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer, TextContext
from longvideo.text import TextEncoder
from longvideo.train.objective import Objective, ratio
from longvideo.train.views import ViewBatch

SIGMA_BUCKETS = 4


@dataclass(frozen=True)
class TeacherForcingConfig:
    """How the objective is run; compilation happens on CUDA alone."""

    compile: bool = True
    compile_mode: str = "default"


@dataclass(frozen=True)
class _Pass:
    """What depends on the number of chunks of a view alone."""

    rope: Rope
    attention: Blockwise


class TeacherForcing(Objective):
    """Trains transformer and text encoder together, on views of any of the lengths in `chunk_counts`."""

    def __init__(
        self,
        transformer: CausalTransformer,
        text_encoder: TextEncoder,
        config: TeacherForcingConfig,
        *,
        spec: ChunkSpec,
        chunk_counts: Collection[int],
        schedule: FlowSchedule,
        device: torch.device,
    ):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.schedule = schedule
        self._passes = {count: _prepare(transformer, spec, count, device) for count in chunk_counts}
        self._run: Callable[..., tuple[Tensor, dict[str, Tensor]]] = self._loss
        if config.compile and device.type == "cuda":
            self._run = torch.compile(self._loss, dynamic=False, mode=config.compile_mode)

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._run(**vars(batch))

    def _loss(
        self,
        clean: Tensor,
        noise: Tensor,
        context_noise: Tensor,
        sigma: Tensor,
        context_sigma: Tensor,
        loss_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        context = self.schedule.add_noise(clean, context_noise, context_sigma)
        velocity = self.velocity(context, self.schedule.add_noise(clean, noise, sigma), sigma, ids, mask)
        error_BT = (velocity - self.schedule.velocity(clean, noise)).square().mean((1, 3, 4))
        loss = masked_mean(self.schedule.loss_weight(sigma) * error_BT, loss_mask)
        return loss, _metrics(error_BT, sigma, loss_mask)

    def velocity(self, context: Tensor, noisy: Tensor, sigma_BT: Tensor, ids_BQS: Tensor, mask_BQS: Tensor) -> Tensor:
        """Return the velocity of the noisy copy, [B, C, T, H, W]."""
        chunks, frames = ids_BQS.shape[1], sigma_BT.shape[1]
        seen = frames - frames // chunks  # the last chunk is nobody's context
        prepared = self._passes[chunks]
        text = self.transformer.encode_text(self.text_encoder(ids_BQS.flatten(0, 1), mask_BQS.flatten(0, 1)))
        velocity = self.transformer(
            torch.cat((context[:, :, :seen], noisy), dim=2),
            torch.cat((torch.zeros_like(sigma_BT[:, :seen]), sigma_BT), dim=1),
            _of_runs(text, chunks),
            rope=prepared.rope,
            attention=prepared.attention,
        )
        return velocity[:, :, seen:]


def _prepare(transformer: CausalTransformer, spec: ChunkSpec, num_chunks: int, device: torch.device) -> _Pass:
    layout = TokenLayout.training(spec, num_chunks)
    return _Pass(transformer.rope(layout.to(device)), Blockwise(layout))


def _of_runs(text: TextContext, chunks: int) -> TextContext:
    """Give every run of tokens its chunk's prompt: those of the clean chunks but the last, then of the noisy ones.

    Slices, since the gradient of an index is a scatter with atomics.
    """

    def runs(x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, chunks))
        return torch.cat((x[:, :-1], x), dim=1).flatten(0, 1)

    return TextContext(tuple(map(runs, text.keys)), tuple(map(runs, text.values)))


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Average over the places where the mask is 1."""
    return (value * mask).sum() / mask.sum()


def _metrics(error_BT: Tensor, sigma_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Return the unweighted error, overall and by quarters of the noise level."""
    error = error_BT.detach() * mask_BT
    metrics = {"mse": ratio(error.sum(), mask_BT.sum())}
    bucket = (sigma_BT * SIGMA_BUCKETS).long().clamp(max=SIGMA_BUCKETS - 1)
    for index in range(SIGMA_BUCKETS):
        chosen = (bucket == index).float()
        metrics[f"mse_{(index + 1) / SIGMA_BUCKETS:g}"] = ratio((error * chosen).sum(), (mask_BT * chosen).sum())
    return metrics
