"""Loss on held-out batches, computed by all ranks together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longvideo.training.precision import TrainingPrecision, autocast
from longvideo.training.window import Window

if TYPE_CHECKING:
    from longvideo.distributed import Mesh
    from longvideo.training.objective import BatchSource, Objective


@torch.no_grad()
def validation_losses(
    objective: Objective,
    source: BatchSource,
    *,
    batches: int,
    mesh: Mesh,
    micro_batch: int | None,
    precision: TrainingPrecision,
) -> dict[str, float]:
    """Return the mean loss of the first `batches` batches of a source, and the objective's metrics, for all ranks.

    The loss is `val_loss`, and a metric such as `mse_0.25` is `val_mse_0.25`; one without weight is left out.

    micro_batch: number of videos of a pass, as in training. precision: number format of the products.
    """
    device = next(objective.parameters()).device
    total, window = torch.zeros((), device=device), Window(device, mesh)
    for number in range(batches):
        shares = source.shares(number, mesh, micro_batch)
        for share in shares:
            with autocast(precision, device):
                loss, metrics = objective(share)
            total += loss / (len(shares) * mesh.world * batches)
            window.add(metrics, size=0)
    means = window.means() if window.names else {}
    return {"val_loss": float(mesh.sum(total)), **{f"val_{name}": mean for name, mean in means.items()}}
