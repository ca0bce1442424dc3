"""Weights of a transformer's blocks in host memory, from which each block's are copied to the device before it runs.

Two buffers on the device hold the weights of two blocks. While one block runs, a stream of its own copies those of the
next into the other buffer. A tensor of a block is a view of its buffer, so the numbers that a block computes with, and
its results, are those of a model that is on the device.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from longvideo.quantization.linear import NVFP4Linear

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from contextlib import AbstractContextManager

    from longvideo.model.transformer import Block, CausalTransformer

ALIGNMENT = 256
"""Largest alignment in bytes that a kernel expects of a weight. Weights of sizes that it divides are adjacent."""
SMALLEST_PIECE = 2**20
NUM_BUFFERS = 2


def offload_blocks(model: CausalTransformer, device: torch.device) -> None:
    """Move the matrices of the blocks to host memory and everything else to a device, in place.

    model: model on the host or on the device, with the products of its layers. Its blocks then run on the device, in
    order (`CausalTransformer.in_turn`), without gradients.
    """
    weights = HostWeights(cast("list[Block]", list(model.blocks)), device)
    model.to(device)
    model.block_weights = weights
    with model.in_turn() as blocks:
        for block in blocks:
            for layer in block.modules():
                if isinstance(layer, NVFP4Linear) and layer.product is not None:
                    layer.set_product(layer.product)  # it may have arranged the weight that was moved


def offloaded_bytes(tensors: Iterator[Tensor]) -> int:
    """Return the size of those tensors of a block that `offload_blocks` moves to the host."""
    return sum(_aligned(tensor.numel() * tensor.element_size()) for tensor in tensors if _is_moved(tensor))


class HostWeights:
    """The matrices of blocks in host memory, and two buffers for them on a device; see `BlockWeights`."""

    recordable = False

    def __init__(self, blocks: list[Block], device: torch.device) -> None:
        """Move the matrices, and make views of the buffers of them. On a GPU the host memory is pinned."""
        self._device, self._lock = device, threading.Lock()
        size = max(offloaded_bytes(_tensors(block)) for block in blocks)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
        self._stored = [
            _store(block, self._buffers[layer % NUM_BUFFERS], pinned=device.type == "cuda")
            for layer, block in enumerate(blocks)
        ]
        self._held = [-1] * NUM_BUFFERS
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = [torch.cuda.Event() if self._stream else None for _ in range(NUM_BUFFERS)]

    @contextmanager
    def in_turn(self, blocks: list[Block]) -> Generator[Iterator[Block], None, None]:
        """See `BlockWeights`. Other threads wait until the context ends."""
        with self._lock:
            try:
                yield (self._loaded(layer, block) for layer, block in enumerate(blocks))
            finally:
                if self._stream is not None:  # the next thread may use another stream
                    self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _loaded(self, layer: int, block: Block) -> Block:
        """Return a block with its weights on the device, and start to copy those of the next one."""
        self._copy(layer)
        if (copied := self._copied[layer % NUM_BUFFERS]) is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        following = (layer + 1) % len(self._stored)
        if following % NUM_BUFFERS != layer % NUM_BUFFERS:
            self._copy(following)
        return block

    def _copy(self, layer: int) -> None:
        """Copy the weights of a block to its buffer, unless they are there; the host does not wait for a GPU."""
        number = layer % NUM_BUFFERS
        if self._held[number] == layer:
            return
        self._held[number] = layer
        with self._copying():
            start = 0
            for piece in self._stored[layer]:
                self._buffers[number][start : start + len(piece)].copy_(piece, non_blocking=True)
                start += len(piece)
            if (copied := self._copied[number]) is not None:
                copied.record()

    def _copying(self) -> AbstractContextManager[object]:
        """Make the copying stream the current one, after the work that still reads what it will overwrite."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)


@dataclass(frozen=True)
class _Place:
    """A tensor of a module by its name, and its place in the bytes of its block."""

    module: nn.Module
    name: str
    start: int
    end: int


def _store(block: Block, buffer: Tensor, *, pinned: bool) -> list[Tensor]:
    """Return the matrices of a block as bytes in host memory, in pieces; in the block, make them views of a buffer."""
    places, end = [], 0
    for module in block.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if _is_moved(tensor):
                size = tensor.numel() * tensor.element_size()
                places.append(_Place(module, name, end, end + size))
                end += _aligned(size)
    stored = torch.zeros(end, dtype=torch.uint8)
    for place in places:
        tensor = getattr(place.module, place.name).detach()
        stored[place.start : place.end] = tensor.contiguous().flatten().view(torch.uint8).cpu()
        view = buffer[place.start : place.end].view(tensor.dtype).view(tensor.shape)
        is_parameter = isinstance(getattr(place.module, place.name), nn.Parameter)
        setattr(place.module, place.name, nn.Parameter(view, requires_grad=False) if is_parameter else view)
    if not pinned:
        return [stored]
    return [piece.pin_memory() for piece in stored.split(_pieces(end))]


def _pieces(size: int) -> list[int]:
    """Return a size as a sum of powers of two and a small rest: torch rounds pinned memory up to a power of two."""
    sizes = []
    while size > SMALLEST_PIECE:
        sizes.append(1 << (size.bit_length() - 1))
        size -= sizes[-1]
    return [*sizes, size] if size else sizes


def _tensors(block: nn.Module) -> Iterator[Tensor]:
    yield from block.parameters()
    yield from block.buffers()


def _is_moved(tensor: Tensor) -> bool:
    return tensor.ndim == 2


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
