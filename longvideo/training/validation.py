"""Loss on held-out batches, computed by all ranks together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longvideo.training.precision import TrainingPrecision, autocast

if TYPE_CHECKING:
    from longvideo.distributed import Mesh
    from longvideo.training.objective import BatchSource, Objective


@torch.no_grad()
def validation_loss(
    objective: Objective,
    source: BatchSource,
    *,
    batches: int,
    mesh: Mesh,
    micro_batch: int | None,
    precision: TrainingPrecision,
) -> float:
    """Return the mean loss of the first `batches` batches of a source, the same on all ranks.

    micro_batch: number of videos of a pass, as in training. precision: number format of the products.
    """
    device = next(objective.parameters()).device
    total = torch.zeros((), device=device)
    for number in range(batches):
        shares = source.shares(number, mesh, micro_batch)
        for share in shares:
            with autocast(precision, device):
                loss, _ = objective(share)
            total += loss / (len(shares) * mesh.world * batches)
    return float(mesh.sum(total))
