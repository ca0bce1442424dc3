"""Estimate the memory of each GPU in a training step from shapes and settings, before any weight is loaded.

Parameters and optimizer states are counted exactly. Activations are counted in rows; a row is one number for each token
and width. The number of rows that a block needs was fitted to measured peaks (docs/training.md compares estimates and
measurements). Peaks are those of `torch.cuda.max_memory_allocated`; CUDA's context and NCCL's buffers come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from longvideo.errors import ConfigError
from longvideo.machine.launcher import launched

if TYPE_CHECKING:
    from longvideo.distributed import Mesh, ParallelConfig
    from longvideo.model.config import TransformerConfig

GIB = 2**30
FP32 = 4
SLACK = 1.1
"""Factor by which the estimate may exceed the memory of a device before training is refused."""
BUCKET = 500_000_000
"""Number of gradients that DeepSpeed collects before it reduces them, by default."""
ROWS_COMPILED, ROWS_EAGER = 9, 33
"""Rows of a block in its backward pass, without those of the feed-forward layer."""
ROWS_MASKED = 8
"""Rows of FlexAttention, instead of the copies of keys and values of block-wise attention."""
ROWS_NVFP4 = 6
"""Rows of the rounded operands of emulated 4-bit products; inputs are kept in 4 bits."""
ROWS_KEPT_COMPILED, ROWS_KEPT_EAGER = 18, 43
"""Rows that a block keeps if it is not recomputed, without those of the feed-forward layer."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one rank that do not depend on the batch.

    weights: weights in the dtype of the products. optimizer: masters, moments, averages, and gradients that are added
    up in fp32. gradients: gradients during a step. carried: gradients that exist when a later pass of the step begins.
    bucket: gradients that are being exchanged between ranks. step: copies that the optimizer makes after activations
    are freed.
    """

    weights: float
    optimizer: float
    gradients: float
    carried: float = 0.0
    bucket: float = 0.0
    step: float = 0.0

    def __add__(self, other: EngineMemory) -> EngineMemory:
        """Add an engine that takes turns with this one: gradients and copies exist for one of the two at a time."""
        return EngineMemory(
            self.weights + other.weights,
            self.optimizer + other.optimizer,
            max(self.gradients, other.gradients),
            max(self.carried, other.carried),
            self.bucket + other.bucket,
            max(self.step, other.step),
        )


def engine_memory(
    num_parameters: int,
    parallel: ParallelConfig,
    *,
    ranks: int,
    bf16: bool,
    passes: int,
    averaged: bool,
    states: float = 0.0,
) -> EngineMemory:
    """Return the memory of the engine that `new_engine` chooses for this process, or for one of several ranks.

    bf16: whether DeepSpeed's weights are bf16. passes: number of backward passes of a step. averaged: whether there is
    an average of the weights. states: bytes of other states of weights on a rank; all optimizers have two moments.
    """
    more = EngineMemory(weights=0.0, optimizer=states, gradients=0.0)
    if launched() or ranks > 1:
        zero_stage = parallel.zero_stage
        return more + _deepspeed_engine(num_parameters, bf16=bf16, ranks=ranks, zero_stage=zero_stage, passes=passes)
    return more + _local_engine(num_parameters, passes=passes, averaged=averaged)


def _local_engine(num_parameters: int, *, passes: int, averaged: bool) -> EngineMemory:
    """Count fp32 weights, two moments, and an average if there is one."""
    return EngineMemory(
        weights=num_parameters * FP32,
        optimizer=num_parameters * FP32 * (3 if averaged else 2),
        gradients=num_parameters * FP32,
        carried=num_parameters * FP32 if passes > 1 else 0.0,
    )


def _deepspeed_engine(num_parameters: int, *, bf16: bool, ranks: int, zero_stage: int, passes: int) -> EngineMemory:
    """Count what ZeRO leaves on a rank.

    Optimizer states and averages are sharded from stage 1 on, gradients from stage 2, weights from stage 3. The bf16
    gradients of several passes are added up in fp32. Those of one pass are copied flat, in their dtype and in fp32.
    """
    size = 2 if bf16 else FP32
    has_masters = bf16 or zero_stage > 0
    shared = [1 if zero_stage < stage else ranks for stage in (1, 2, 3)]
    states = num_parameters * FP32 * (4 if has_masters else 3) / shared[0]
    added_up = num_parameters * FP32 / shared[1] if passes > 1 and bf16 else 0.0
    gradients = num_parameters * size / shared[1]
    return EngineMemory(
        weights=num_parameters * size / shared[2],
        optimizer=states + added_up,
        gradients=gradients,
        carried=gradients if passes > 1 else 0.0,
        bucket=min(BUCKET, num_parameters) * size if zero_stage in (1, 2) else 0.0,
        step=num_parameters * (size + FP32) / shared[0] if passes == 1 and has_masters else 0.0,
    )


@dataclass(frozen=True)
class BlockMemory:
    """How the blocks run.

    size: bytes of a number. checkpoint: whether blocks are recomputed. compiled: whether they are compiled. nvfp4:
    whether their products are emulated 4-bit products. copies: rows of keys and values that attention copies. outliers:
    whether the layers keep outliers of their inputs in 16 bits.
    """

    size: int
    checkpoint: bool
    compiled: bool
    nvfp4: bool = False
    copies: float = 0.0
    outliers: bool = False

    def running(self, config: TransformerConfig) -> float:
        """Return the rows that one block needs in its backward pass, with what is computed again."""
        rows = _feed_forward(config) + (ROWS_NVFP4 if self.nvfp4 else 0)
        if self.outliers:
            rows += _inputs(config)
        if self.checkpoint:
            rows += (ROWS_COMPILED if self.compiled else ROWS_EAGER) + 2 * self.copies
        return rows

    def kept(self, config: TransformerConfig) -> float:
        """Return the rows that one block keeps from its forward to its backward pass."""
        if self.checkpoint:
            return 1
        rows = ROWS_KEPT_COMPILED if self.compiled else ROWS_KEPT_EAGER
        if self.outliers:
            rows += _inputs(config)
        return rows + _feed_forward(config) + self.copies - (ROWS_NVFP4 if self.nvfp4 else 0)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device, by their use.

    frozen: weights that are not trained. text: keys and values of prompts, and their gradients. activations: what all
    blocks keep. block: what the running block needs besides. cache: keys and values of earlier chunks.
    """

    engine: EngineMemory
    frozen: float
    text: float
    activations: float
    block: float
    cache: float = 0.0

    @property
    def always(self) -> float:
        """Bytes that are in use during the whole step."""
        return self.engine.weights + self.frozen + self.engine.optimizer

    @property
    def moments(self) -> dict[str, float]:
        """Bytes at the three moments of which one is the peak."""
        engine, held = self.engine, self.always + self.cache + self.engine.bucket
        return {
            "activations": held + self.text + engine.carried + self.activations + self.block,
            "gradients": held + self.text + engine.gradients + self.block,
            "optimizer step": self.always + engine.gradients + engine.step,
        }

    @property
    def total(self) -> float:
        return max(self.moments.values())

    def line(self) -> str:
        """Describe the estimate in one line, in GiB."""
        peak = max(self.moments, key=lambda name: self.moments[name])
        parts = {
            "weights": self.engine.weights + self.frozen,
            "optimizer": self.engine.optimizer,
            "gradients": self.engine.gradients,
            "activations": self.text + self.activations,
            "one block": self.block,
            "cache": self.cache,
        }
        listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
        return f"about {self.total / GIB:.1f} GiB on each device at the peak ({peak}): {listed}"


def text_bytes(config: TransformerConfig, *, prompts: float, uses: float, size: int) -> float:
    """Return the bytes of cross-attention's keys and values, of what their backward pass keeps, and of their gradients.

    prompts: number of encoded prompts. uses: number of runs of tokens that follow a prompt, each with a copy.
    """
    numbers = config.num_layers * config.text_len * config.dim
    within_norm = 2 * FP32  # the norm of the keys keeps its input and its result in fp32
    return numbers * (prompts * (within_norm + 2 * size) + 2 * uses * 2 * size)


def head_bytes(config: TransformerConfig, tokens: float, size: int) -> float:
    """Return the bytes that the last norm and projection keep: two rows in fp32 and one in the model's dtype."""
    return tokens * config.dim * (2 * FP32 + size)


def row_bytes(config: TransformerConfig, tokens: float, size: int) -> float:
    """Return the bytes of one row: a number for each token and width."""
    return tokens * config.dim * size


def report_estimate(estimate: MemoryEstimate, device: torch.device, mesh: Mesh, remedy: str) -> None:
    """Print an estimate and the memory of the GPU; raise ConfigError with the remedy if training cannot fit.

    Nothing is printed on a CPU, where the memory of training was never measured.
    """
    if device.type != "cuda":
        return
    available = torch.cuda.get_device_properties(device).total_memory
    if mesh.is_main:
        print(f"memory: {estimate.line()}; the device has {available / GIB:.1f} GiB", flush=True)
    if estimate.total > SLACK * available:
        raise ConfigError(f"training needs {estimate.line()}; a device has {available / GIB:.1f} GiB; {remedy}")


def _feed_forward(config: TransformerConfig) -> float:
    """Return the rows of the feed-forward layer's hidden values before and after their activation."""
    return 2 * config.ffn_dim / config.dim


def _inputs(config: TransformerConfig) -> float:
    """Return the rows of the inputs of a block's linear layers: four of self-attention, two of cross-attention."""
    return 4 + 2 + 1 + config.ffn_dim / config.dim
