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
from longvideo.model.transformer import CausalTransformer
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
    """What depends on the number of chunks of a view alone. rows: the chunk whose prompt each run of tokens has."""

    rope: Rope
    attention: Blockwise
    rows: Tensor


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
        self._predict: Callable[..., Tensor] = self.velocity
        if config.compile and device.type == "cuda":
            self._predict = torch.compile(self.velocity, dynamic=False, mode=config.compile_mode)

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        context = self.schedule.add_noise(batch.clean, batch.context_noise, batch.context_sigma)
        noisy = self.schedule.add_noise(batch.clean, batch.noise, batch.sigma)
        velocity = self._predict(context, noisy, batch.sigma, batch.ids, batch.mask)
        target = self.schedule.velocity(batch.clean, batch.noise)
        error_BT = (velocity - target).square().mean((1, 3, 4))
        loss = masked_mean(self.schedule.loss_weight(batch.sigma) * error_BT, batch.loss_mask)
        return loss, _metrics(error_BT, batch.sigma, batch.loss_mask)

    def velocity(self, context: Tensor, noisy: Tensor, sigma_BT: Tensor, ids_BQS: Tensor, mask_BQS: Tensor) -> Tensor:
        """Return the velocity of the noisy copy, [B, C, T, H, W]."""
        batch, chunks, _ = ids_BQS.shape
        frames = sigma_BT.shape[1]
        seen = frames - frames // chunks  # the last chunk is nobody's context
        prepared = self._passes[chunks]
        text = self.transformer.encode_text(self.text_encoder(ids_BQS.flatten(0, 1), mask_BQS.flatten(0, 1)))
        first_row = chunks * torch.arange(batch, device=sigma_BT.device)
        velocity = self.transformer(
            torch.cat((context[:, :, :seen], noisy), dim=2),
            torch.cat((torch.zeros_like(sigma_BT[:, :seen]), sigma_BT), dim=1),
            text.select(first_row[:, None] + prepared.rows),
            rope=prepared.rope,
            attention=prepared.attention,
        )
        return velocity[:, :, seen:]


def _prepare(transformer: CausalTransformer, spec: ChunkSpec, num_chunks: int, device: torch.device) -> _Pass:
    layout = TokenLayout.training(spec, num_chunks)
    chunk = torch.arange(num_chunks, device=device)
    return _Pass(transformer.rope(layout.to(device)), Blockwise(layout), torch.cat((chunk[:-1], chunk)))


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
