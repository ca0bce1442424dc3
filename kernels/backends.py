"""Which implementation of an operation runs on a device, and why.

All code that chooses or prints a backend calls this module. A backend is chosen once, when a module is built; there is
no fallback later. An implementation is a module, or an object, that has the functions of one of the protocols below;
type checkers compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from longvideo.kernels.attention import cudnn_fp8, sdpa
from longvideo.kernels.fp8 import scaled_mm as fp8_products
from longvideo.kernels.nvfp4 import scaled_mm as nvfp4_products
from longvideo.kernels.nvfp4 import te
from longvideo.kernels.nvfp4.format import ExactOperand, NVFP4Tensor, Rule

if TYPE_CHECKING:
    from longvideo.kernels.fp8.format import FP8Rows, FP8Tensor
    from longvideo.kernels.kv_dequant.format import QuantizedSlots
    from longvideo.kernels.vae.format import FP8Kernel


TransformerPrecision = Literal["bf16", "nvfp4", "nvfp4-weights", "fp8", "fp8-emulated", "nvfp4-te"]
"""Number format of the products in the blocks of a transformer; `NumberFormats` explains each."""
AttentionPrecision = Literal["bf16", "fp8", "fp8-emulated"]
"""Number format of attention to the past."""
FP4_PRODUCTS = "torch scaled_mm on FP4 units"
FP4_PRODUCTS_OF_TE = "TransformerEngine on FP4 units"
FP4_TRAINING = "TransformerEngine on FP4 units, for the recipes that it supports"
FP8_PRODUCTS = "torch scaled_mm on FP8 units, rows of E4M3"
FP8_ATTENTION = "cuDNN frontend, E4M3"
FP8_CONVOLUTIONS = "triton on FP8 units, E4M3"


@dataclass(frozen=True)
class Backend:
    """The implementation that runs an operation in a number format on a device.

    name: name of the implementation, None where the device cannot run the format.
    is_emulated: whether the device has no units for the format, so that the same numbers are computed in a wider one.
    reason: reason why the operation is emulated or cannot run, None where it runs on units of its own.
    native: name of the implementation on units for the format, which does not run for that reason.
    """

    name: str | None
    is_emulated: bool = False
    reason: str | None = None
    native: str | None = None

    def __str__(self) -> str:
        return f"emulated by {self.name} ({self.reason})" if self.is_emulated else self.name or f"none ({self.reason})"


def product_backend(precision: TransformerPrecision, device: torch.device) -> Backend:
    """Return what multiplies in the blocks of a transformer of this precision."""
    library = _library(device)
    if precision == "nvfp4-weights":
        return Backend(f"{library} on weights that {kernels_on(device)} unpacks")
    if precision == "nvfp4":
        if reason := nvfp4_products.unavailable(device):
            return Backend(f"{kernels_on(device)} and {library}", is_emulated=True, reason=reason, native=FP4_PRODUCTS)
        return Backend(FP4_PRODUCTS)
    if precision == "nvfp4-te":
        if reason := te.product_unavailable(device):
            return Backend(None, reason=f"{reason}; or use --precision nvfp4", native=FP4_PRODUCTS_OF_TE)
        return Backend(FP4_PRODUCTS_OF_TE)
    if precision == "fp8":
        reason = fp8_products.unavailable(device)
        return Backend(None, reason=reason, native=FP8_PRODUCTS) if reason else Backend(FP8_PRODUCTS)
    return _fp8_reference(device) if precision == "fp8-emulated" else Backend(library)


def training_backend(device: torch.device) -> Backend:
    """Return what multiplies in linear layers that train in NVFP4."""
    if reason := te.unavailable(device):
        return Backend(
            f"{kernels_on(device)} and {_library(device)}", is_emulated=True, reason=reason, native=FP4_TRAINING
        )
    return Backend(FP4_TRAINING)


def attention_backend(attention: AttentionPrecision, device: torch.device) -> Backend:
    """Return what attends to the past in this format."""
    if attention == "fp8":
        reason = cudnn_fp8.unavailable(device)
        if reason is None:
            return Backend(FP8_ATTENTION)
        return Backend(None, reason=f"{reason}; or use --attention bf16", native=FP8_ATTENTION)
    if attention == "fp8-emulated":
        return _fp8_reference(device)
    return Backend("torch SDPA, cuDNN first" if device.type == "cuda" else "torch SDPA")


def torch_attention(device: torch.device, dtype: torch.dtype) -> sdpa.AttentionChoice:
    """Return the kernel that torch chooses for attention in a dtype, and why it chooses no other."""
    return sdpa.choice(device, dtype)


def convolution_backend(precision: str, device: torch.device) -> Backend:
    """Return what runs the convolutions of the decoder. precision: number format, as of `NumberFormats.decoder`."""
    if precision == "fp8":
        reason = fp8_products.missing_fp8_units(device, "FP8 convolutions", "use --decoder-precision bf16")
        return Backend(None, reason=reason, native=FP8_CONVOLUTIONS) if reason else Backend(FP8_CONVOLUTIONS)
    if precision == "fp8-emulated":
        return _fp8_reference(device)
    return Backend("cuDNN" if device.type == "cuda" else "oneDNN")


def kernels_on(device: torch.device) -> str:
    """Return the name of what runs the operations of this module on a device: "triton" or "reference"."""
    return "triton" if device.type == "cuda" else "reference"


def _library(device: torch.device) -> str:
    return "cuBLAS" if device.type == "cuda" else "oneDNN"


def _fp8_reference(device: torch.device) -> Backend:
    if device.type != "cpu":
        return Backend(None, reason=f"fp8-emulated is for CPUs, got device {str(device)!r}; use fp8")
    return Backend("reference", is_emulated=True, reason="a CPU has no FP8 units")


class KVOperations(Protocol):
    """Operations of a 4-bit KV cache; `longvideo.kernels.kv_dequant.reference` defines them."""

    def write_slot(
        self, slots: QuantizedSlots, slot: int, keys_BLNK: Tensor, values_BLNK: Tensor, rule: Rule = Rule.ADAPTIVE
    ) -> None: ...

    def rebuild(
        self,
        slots: QuantizedSlots,
        which: Tensor,
        cos_SLH: Tensor,
        sin_SLH: Tensor,
        keys_BSLNK: Tensor,
        values_BSLNK: Tensor,
    ) -> None: ...


class NVFP4Operations(Protocol):
    """Operations of NVFP4 products; `longvideo.kernels.nvfp4.reference` defines them."""

    def quantize(self, x: Tensor, rule: Rule = Rule.ADAPTIVE) -> NVFP4Tensor: ...

    def quantize_exact(
        self,
        x: Tensor,
        rule: Rule = Rule.ADAPTIVE,
        *,
        seed: int | Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> ExactOperand: ...

    def quantize_tiles_exact(
        self, x_RK: Tensor, rule: Rule, *, dtype: torch.dtype = torch.bfloat16
    ) -> ExactOperand: ...

    def quantize_across(self, x_MC: Tensor, rule: Rule = Rule.ADAPTIVE, *, hadamard: bool = False) -> NVFP4Tensor: ...

    def quantize_across_exact(
        self,
        x_MC: Tensor,
        rule: Rule = Rule.ADAPTIVE,
        *,
        hadamard: bool = False,
        seed: int | Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> ExactOperand: ...

    def layer_norm_modulate_quantize(
        self, h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor, rule: Rule = Rule.ADAPTIVE, *, eps: float
    ) -> NVFP4Tensor: ...

    def layer_norm_modulate_quantize_exact(
        self,
        h_BLD: Tensor,
        shift_BTSD: Tensor,
        scale_BTSD: Tensor,
        rule: Rule = Rule.ADAPTIVE,
        *,
        eps: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> ExactOperand: ...

    def gelu_tanh_quantize(self, h: Tensor, rule: Rule = Rule.ADAPTIVE) -> NVFP4Tensor: ...

    def gelu_tanh_quantize_exact(
        self, h: Tensor, rule: Rule = Rule.ADAPTIVE, *, dtype: torch.dtype = torch.bfloat16
    ) -> ExactOperand: ...

    def exact(self, quantized: NVFP4Tensor, dtype: torch.dtype = torch.bfloat16) -> ExactOperand: ...

    def dequantize(self, quantized: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor: ...

    def add_scaled_bias(self, product: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor: ...


class FP8Operations(Protocol):
    """Operations of FP8 products with a scale for each row or tensor; `kernels.fp8.reference` defines them."""

    def quantize_rows(self, x: Tensor) -> FP8Rows: ...

    def gelu_tanh_quantize_rows(self, h: Tensor) -> FP8Rows: ...

    def matmul(self, a: FP8Rows, b: FP8Rows, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor: ...

    def largest_magnitude(self, x: Tensor) -> Tensor: ...

    def quantize_tensor(self, x_RC: Tensor, amax: Tensor, dtype: torch.dtype) -> FP8Tensor: ...

    def quantize_transposed(self, x_RC: Tensor, amax: Tensor, dtype: torch.dtype) -> FP8Tensor: ...

    def quantize_both(self, x_RC: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[FP8Tensor, FP8Tensor]: ...

    def matmul_tensors(
        self, a_RK: FP8Tensor, b_CK: FP8Tensor, out_dtype: torch.dtype, *, fast_sums: bool = False
    ) -> Tensor: ...


class NormOperations(Protocol):
    """Operations between the products of a block; `longvideo.kernels.norm.reference` defines them."""

    def add_norm(
        self,
        h_BLD: Tensor,
        update_BLD: Tensor | None,
        gate: Tensor | None,
        multiplier: Tensor | None,
        shift: Tensor | None,
        out_BLD: Tensor | None,
        scales_BL: Tensor | None = None,
        *,
        eps: float,
        bias_D: Tensor | None = None,
    ) -> None: ...

    def rms_norm(self, x_BLD: Tensor, gamma_D: Tensor, out_BLD: Tensor, *, eps: float) -> None: ...


class RotaryOperations(Protocol):
    """Operations between the projections of attention and the KV cache.

    `longvideo.kernels.rotary.reference` defines them.
    """

    def norm_rotate_keep(
        self,
        q_BLNK: Tensor,
        k_BLNK: Tensor,
        v_BLNK: Tensor,
        gamma_q: Tensor,
        gamma_k: Tensor,
        cos_LH: Tensor,
        sin_LH: Tensor,
        slot: Tensor,
        rotated_BLNK: Tensor,
        keys_BSLNK: Tensor,
        values_BSLNK: Tensor,
        *,
        eps: float,
        mean_NK: Tensor | None = None,
    ) -> None: ...


class DecoderOperations(Protocol):
    """Operations of the video decoder; `longvideo.kernels.vae.reference` defines them."""

    def add_norm_silu(
        self,
        h: Tensor,
        bias: Tensor | None,
        x: Tensor | None,
        total: Tensor | None,
        gamma: Tensor | None = None,
        out: Tensor | None = None,
        inverse_scale: float = 1.0,
    ) -> None: ...

    def convolve(self, inputs: Tensor, frames: int, kernel: FP8Kernel, out: Tensor) -> None: ...

    def quantize(self, x: Tensor, out: Tensor) -> Tensor: ...

    def upsample_add_norm_silu(
        self,
        folded: Tensor,
        bias: Tensor,
        x: Tensor,
        offsets: tuple[int, int, int],
        times: int,
        total: Tensor,
        gamma: Tensor,
        out: Tensor,
        inverse_scale: float = 1.0,
    ) -> None: ...

    def to_pixels(self, packed: Tensor, bias: Tensor | None, patch: int, out: Tensor) -> None: ...


def norm_operations(device: torch.device) -> NormOperations:
    """Return the Triton kernels on CUDA, plain torch elsewhere. Raises ValueError where neither can run."""
    if _uses_triton(device):
        from longvideo.kernels.norm import triton as operations
    else:
        from longvideo.kernels.norm import reference as operations
    return operations


def rotary_operations(device: torch.device) -> RotaryOperations:
    """Return the Triton kernels on CUDA, plain torch elsewhere. Raises ValueError where neither can run."""
    if _uses_triton(device):
        from longvideo.kernels.rotary import triton as operations
    else:
        from longvideo.kernels.rotary import reference as operations
    return operations


def decoder_operations(device: torch.device) -> DecoderOperations:
    """Return the Triton kernels on CUDA, plain torch elsewhere. Raises ValueError where neither can run."""
    if _uses_triton(device):
        from longvideo.kernels.vae import triton as operations
    else:
        from longvideo.kernels.vae import reference as operations
    return operations


def fp8_operations(device: torch.device) -> FP8Operations:
    """Return Triton and `scaled_mm` on CUDA, plain torch elsewhere. Raises ValueError where neither can run."""
    if _uses_triton(device):
        if reason := fp8_products.unavailable(device):
            raise ValueError(reason)
        from longvideo.kernels.fp8 import triton as operations
    else:
        from longvideo.kernels.fp8 import reference as operations
    return operations


def kv_operations(device: torch.device) -> KVOperations:
    """Return the Triton kernels on CUDA, plain torch elsewhere. Raises ValueError where neither can run."""
    if _uses_triton(device):
        from longvideo.kernels.kv_dequant import triton as operations
    else:
        from longvideo.kernels.kv_dequant import reference as operations
    return operations


def nvfp4_operations(device: torch.device) -> NVFP4Operations:
    """Return the Triton kernels on CUDA, plain torch elsewhere. Raises ValueError where neither can run."""
    if _uses_triton(device):
        from longvideo.kernels.nvfp4 import triton as operations
    else:
        from longvideo.kernels.nvfp4 import reference as operations
    return operations


def missing_triton() -> str | None:
    """Return why Triton kernels cannot run on any device, or None when they can run on CUDA devices."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the package triton is not installed; it comes with torch's CUDA builds"
    return None


def _uses_triton(device: torch.device) -> bool:
    if device.type in ("cpu", "meta"):
        return False
    if device.type != "cuda":
        raise ValueError(f"no kernels for device {device}; use cpu, or cuda for Triton kernels")
    if reason := missing_triton():
        raise ValueError(f"no kernels for device {device}: {reason}")
    return True
