"""Teacher forcing: predict the velocity of every chunk of a noisy copy, given clean earlier chunks, in one pass.

Shapes: B views, C channels, T latent frames, H W latent grid, Q chunks, S tokens, L text positions, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longvideo.flow.schedule import FlowSchedule
from longvideo.model.attention import Blockwise
from longvideo.model.layout import TokenLayout
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
    compile_text: bool = False
    compile_mode: str = "default"


class TeacherForcing(Objective):
    """Trains transformer and text encoder together."""

    def __init__(
        self,
        transformer: CausalTransformer,
        text_encoder: TextEncoder,
        config: TeacherForcingConfig,
        *,
        spec: ChunkSpec,
        num_chunks: int,
        schedule: FlowSchedule,
        device: torch.device,
    ):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.schedule = schedule
        self.num_chunks = num_chunks
        # the clean and the noisy copy of a chunk side by side, so that they share one prompt's keys and values
        clean = torch.arange(num_chunks * spec.chunk_frames).view(num_chunks, -1)
        order = torch.cat((clean, clean + clean.numel()), dim=1).flatten().tolist()
        layout = TokenLayout.teacher_forcing(spec, num_chunks).permute_frames(order)
        self.attention = Blockwise(layout)
        self.layout = layout.to(device)
        self._predict: Callable[..., Tensor] = self.velocity
        self._encode: Callable[..., Tensor] = self.text_encoder.forward
        if config.compile and device.type == "cuda":
            self._predict = torch.compile(self.velocity, dynamic=False, mode=config.compile_mode)
            if config.compile_text:
                self._encode = torch.compile(self.text_encoder.forward, dynamic=False)

    def forward(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        features_PLD = self._encode(batch.ids.flatten(0, 1), batch.mask.flatten(0, 1))
        context = self.schedule.add_noise(batch.clean, batch.context_noise, batch.context_sigma)
        noisy = self.schedule.add_noise(batch.clean, batch.noise, batch.sigma)
        velocity = self._predict(context, noisy, batch.sigma, features_PLD)
        target = self.schedule.velocity(batch.clean, batch.noise)
        error_BT = (velocity - target).square().mean((1, 3, 4))
        loss = masked_mean(self.schedule.loss_weight(batch.sigma) * error_BT, batch.loss_mask)
        return loss, _metrics(error_BT, batch.sigma, batch.loss_mask)

    def velocity(self, context: Tensor, noisy: Tensor, sigma_BT: Tensor, features_PLD: Tensor) -> Tensor:
        """Return the velocity of the noisy copy, [B, C, T, H, W]. Row b * Q + q of the features belongs to chunk q."""
        velocity = self.transformer(
            self._side_by_side(context, noisy, dim=2),
            self._side_by_side(torch.zeros_like(sigma_BT), sigma_BT, dim=1),
            self.transformer.encode_text(features_PLD),
            layout=self.layout,
            attention=self.attention,
        )
        return velocity.unflatten(2, (self.num_chunks, 2, -1))[:, :, :, 1].flatten(2, 3)

    def _side_by_side(self, clean: Tensor, noisy: Tensor, *, dim: int) -> Tensor:
        """Join two copies along time, chunk by chunk, in the order of the layout."""
        chunks = [x.unflatten(dim, (self.num_chunks, -1)) for x in (clean, noisy)]
        return torch.stack(chunks, dim=dim + 1).flatten(dim, dim + 2)


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
