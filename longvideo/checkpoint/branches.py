"""Adapters of a packed transformer that stay next to its weights: low-rank branches of its packed layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from longvideo.checkpoint.packed import CODES
from longvideo.checkpoint.tensors import Weights, listing, read
from longvideo.checkpoint.updates import LowRank, StoredAdapter
from longvideo.quantization.linear import NVFP4Linear

if TYPE_CHECKING:
    from longvideo.model.transformer import CausalTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Branches:
    """Updates of packed layers that are computed next to them, and all other updates.

    updates: low-rank updates with strengths, by layer. others: the adapters with the updates that are added to weights:
    of layers and biases that are not packed, and of the layers in `widened`. widened: packed layers with an update that
    is not low-rank, a difference or DoRA; they are unpacked for the sum.
    """

    updates: Mapping[str, Sequence[tuple[LowRank, float]]]
    others: tuple[StoredAdapter, ...]
    widened: tuple[str, ...] = ()

    @classmethod
    def of(cls, base: Weights, adapters: Sequence[StoredAdapter]) -> Branches:
        """Divide the updates of adapters that fit the base. Adapters of strength 0 have no updates."""
        active = [one.finite() for one in adapters if one.strength]
        names = dict.fromkeys(name for one in active for name in one.updates)
        packed = [name for name in names if f"{name.removesuffix('.weight')}.{CODES}" in base.infos]
        updates: dict[str, list[tuple[LowRank, float]]] = {}
        widened: list[str] = []
        for name in packed:
            layer = name.removesuffix(".weight")
            of_layer = [(update, one.strength) for one in active for update in one.updates.get(name, ())]
            low_rank = [
                (update, strength)
                for update, strength in of_layer
                if isinstance(update, LowRank) and update.magnitude is None
            ]
            if len(low_rank) == len(of_layer):
                updates[layer] = low_rank
            else:
                widened.append(layer)
        kept = {f"{layer}.weight" for layer in updates}
        others = [
            replace(one, updates={name: own for name, own in one.updates.items() if name not in kept}) for one in active
        ]
        return cls(updates, tuple(others), tuple(widened))

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer's branch: the sum of those of its updates."""
        return {layer: sum(update.rank for update, _ in updates) for layer, updates in self.updates.items()}

    @property
    def num_values(self) -> int:
        """Number of values of all branches."""
        every = (update for updates in self.updates.values() for update, _ in updates)
        return sum(update.down.info.num_values + update.up.info.num_values for update in every)

    def report(self, label: str, dtype: torch.dtype) -> None:
        """Log one line about the layers that are unpacked. label: name of the base. dtype: of these layers."""
        if self.widened:
            logger.warning(
                "%s: %d packed layers (%s) have updates that are not low-rank and become %s, because 4 bits would round"
                " most of such an update away",
                *(label, len(self.widened), listing(self.widened), str(dtype).removeprefix("torch.")),
            )

    def attach(self, model: CausalTransformer) -> None:
        """Read the updates and add them to the layers, in the dtype and on the device of the model.

        Several updates of a layer become one branch: their `down` are stacked, and their `up` scaled and stacked.
        """
        weight = model.patch_embedding.weight
        for layer, updates in self.updates.items():
            module = model.get_submodule(layer)
            assert isinstance(module, NVFP4Linear), layer
            down = torch.cat([read(update.down).float() for update, _ in updates])
            up = torch.cat([update.scale * strength * read(update.up).float() for update, strength in updates], dim=1)
            module.add_branch(down.to(weight), up.to(weight))
