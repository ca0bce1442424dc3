"""Measure and limit the memory that torch reserves on GPUs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from longvideo.errors import UserError
from longvideo.infer.fit.memory import CONTEXT_BYTES

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

GB = 10**9


class ReservedMemory:
    """The peak of the memory that a process takes on GPUs, and a limit to it, as if the GPUs were smaller.

    Counted are everything that torch reserves and 1 GB for each CUDA context, which torch does not count.
    """

    def __init__(self, devices: Iterable[torch.device], limit: float | None = None) -> None:
        """Set the limit, which holds from now on.

        devices: devices of the process; CPUs are left out. limit: memory of each GPU, GB; None means all of it.
        Raises UserError for a limit without a GPU, and for one that is above a GPU's memory or leaves none to torch.
        """
        self._gpus = list(dict.fromkeys(device for device in devices if device.type == "cuda"))
        self._bytes = dict.fromkeys(self._gpus, 0)
        self._fractions: dict[torch.device, float] = {}
        if limit is not None:
            if not self._gpus:
                raise UserError(f"--memory-limit is {limit:g}, but there is no GPU; leave it out")
            self._fractions = {gpu: _fraction(gpu, limit) for gpu in self._gpus}
        self._apply(self._fractions)

    def begin_part(self) -> None:
        """Let torch's peaks begin again; the largest so far is kept."""
        for gpu in self._gpus:
            self._bytes[gpu] = max(self._bytes[gpu], torch.cuda.max_memory_reserved(gpu))
            torch.cuda.reset_peak_memory_stats(gpu)

    @contextmanager
    def suspended(self) -> Generator[None, None, None]:
        """Neither count nor limit what the block takes."""
        self.begin_part()
        self._apply(dict.fromkeys(self._fractions, 1.0))
        try:
            yield
        finally:
            if self._gpus:
                torch.cuda.empty_cache()
            for gpu in self._gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
            self._apply(self._fractions)

    def peaks(self) -> dict[str, int]:
        """Return the peak of each GPU so far, bytes."""
        return {
            str(gpu): max(size, torch.cuda.max_memory_reserved(gpu)) + CONTEXT_BYTES
            for gpu, size in self._bytes.items()
        }

    @staticmethod
    def _apply(fractions: dict[torch.device, float]) -> None:
        for gpu, fraction in fractions.items():
            torch.cuda.set_per_process_memory_fraction(fraction, gpu)


def _fraction(gpu: torch.device, limit: float) -> float:
    """Return the fraction of the memory of a GPU that torch may reserve. limit: memory with the context, GB."""
    total = torch.cuda.get_device_properties(gpu).total_memory
    if not CONTEXT_BYTES < limit * GB <= total:
        raise UserError(
            f"--memory-limit is {limit:g}; expected more than {CONTEXT_BYTES / GB:g} GB, for the CUDA context, and at"
            f" most the {total / GB:.1f} GB of {gpu}"
        )
    return (limit * GB - CONTEXT_BYTES) / total
