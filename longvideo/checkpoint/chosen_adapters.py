"""Open the adapters that a user chose."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from longvideo.checkpoint.formats import recognize
from longvideo.checkpoint.locations import HUB_ID, HUB_PREFIX, WEIGHT_SUFFIXES, is_local, locate
from longvideo.errors import CheckpointError

if TYPE_CHECKING:
    from longvideo.checkpoint.choices import AdapterChoice
    from longvideo.checkpoint.updates import StoredAdapter


def open_choice(choice: AdapterChoice) -> StoredAdapter:
    """Open an adapter that a user chose. Raises CheckpointError if it is something else."""
    is_hub_id = HUB_ID.fullmatch(choice.name.removeprefix(HUB_PREFIX)) and not choice.name.endswith(WEIGHT_SUFFIXES)
    if not is_hub_id and not is_local(choice.name):
        raise CheckpointError(
            f"there is no adapter {choice.name!r}; use a file, a folder or a Hugging Face id like org/name"
        )
    stored = recognize(locate(choice.name))
    if stored.adapter is None:
        raise CheckpointError(f"{choice.name} is not an adapter but a {stored.format}; use it as the model")
    return replace(stored.adapter, strength=choice.strength)
