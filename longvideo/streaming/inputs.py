"""Computation of the inputs of a transformer's products, in one pass over memory for each input.

An input has the format in which its layer multiplies: a tensor, or values that are rounded to 8 or 4 bits already.
Shapes: B samples, L tokens, D model dim, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.kernels.fp8.format import FP8Rows
from longvideo.quantization.fp8 import FP8Linear
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import W4A4, W4A16, InputPair

if TYPE_CHECKING:
    from longvideo.kernels.backends import FP8Operations, NormOperations


@dataclass
class ResidualStream:
    """Activations of a pass with the last update, which the next norm adds in its own pass over memory.

    h_BLD: the activations without the update. gate: factor of the update, [B, T, D], None for one. bias_D: value added
    to the update before the gate.
    """

    h_BLD: Tensor
    update_BLD: Tensor | None = None
    gate: Tensor | None = None
    bias_D: Tensor | None = None

    def add(self, update_BLD: Tensor, gate: Tensor | None, bias_D: Tensor | None = None) -> None:
        """Set the update that the next norm adds."""
        self.update_BLD, self.gate, self.bias_D = update_BLD, gate, bias_D


class Inputs(Protocol):
    """Functions that return inputs in the format of their layers."""

    def norm(self, stream: ResidualStream, multiplier: Tensor, shift: Tensor) -> Any:
        """Add the update of a stream in place, and return the norm of the sum x multiplier + shift."""
        ...

    def round(self, x: Tensor | FP8Rows) -> Any:
        """Return x in the format of the layer."""
        ...

    def gelu(self, layer: nn.Module, x: Any) -> Any:
        """Return GELU (tanh formula) of the result of `layer` for x, in the format of the next layer."""
        ...


class Unrounded:
    """Inputs in the dtype of the model."""

    def __init__(self, operations: NormOperations, eps: float, dtype: torch.dtype) -> None:
        self._operations, self._eps, self._dtype = operations, eps, dtype

    def norm(self, stream: ResidualStream, multiplier: Tensor, shift: Tensor) -> Tensor:
        out = torch.empty_like(stream.h_BLD)
        update = stream.h_BLD, stream.update_BLD, stream.gate
        self._operations.add_norm(*update, multiplier, shift, out, eps=self._eps, bias_D=stream.bias_D)
        return out

    def round(self, x: Tensor | FP8Rows) -> Tensor:
        return _unrounded(x, self._dtype)

    def gelu(self, layer: nn.Module, x: Any) -> Tensor:
        weight = _weight(layer, x.dtype) if isinstance(x, Tensor) and x.is_cuda else None
        if weight is None:
            return F.gelu(layer(x), approximate="tanh")
        # bias and GELU in the epilogue of the product save a pass over the widest activation
        product = torch._addmm_activation(cast("Tensor", layer.bias), x.flatten(0, -2), weight.t(), use_gelu=True)  # pyright: ignore[reportPrivateUsage]
        return product.unflatten(0, x.shape[:-1])


class RoundedToFP8:
    """Inputs in E4M3 with a scale for each token."""

    def __init__(self, operations: NormOperations, eps: float, fp8: FP8Operations) -> None:
        self._operations, self._eps, self._fp8 = operations, eps, fp8

    def norm(self, stream: ResidualStream, multiplier: Tensor, shift: Tensor) -> FP8Rows:
        h_BLD = stream.h_BLD
        values = torch.empty_like(h_BLD, dtype=torch.float8_e4m3fn)
        scales = torch.empty(h_BLD.shape[:2], dtype=torch.float32, device=h_BLD.device)
        update = h_BLD, stream.update_BLD, stream.gate
        self._operations.add_norm(*update, multiplier, shift, values, scales, eps=self._eps, bias_D=stream.bias_D)
        return FP8Rows(values, scales)

    def round(self, x: Tensor | FP8Rows) -> FP8Rows:
        return x if isinstance(x, FP8Rows) else self._fp8.quantize_rows(x)

    def gelu(self, layer: nn.Module, x: Any) -> FP8Rows:
        return self._fp8.gelu_tanh_quantize_rows(layer(x))


class RoundedToNVFP4:
    """Inputs in 4 bits, rounded by the product of the layers."""

    def __init__(self, operations: NormOperations, eps: float, dtype: torch.dtype, product: W4A4) -> None:
        self._operations, self._eps, self._dtype, self._product = operations, eps, dtype, product

    def norm(self, stream: ResidualStream, multiplier: Tensor, shift: Tensor) -> Any:
        h_BLD = stream.h_BLD
        if stream.update_BLD is not None:
            update = h_BLD, stream.update_BLD, stream.gate
            self._operations.add_norm(*update, None, None, None, eps=self._eps, bias_D=stream.bias_D)
        shift_BTSD, multiplier_BTSD = (x.expand(1, 1, -1) if x.ndim == 1 else x for x in (shift, multiplier))
        return self._product.prepare_modulated(
            h_BLD, shift_BTSD.float().unsqueeze(2), (multiplier_BTSD.float() - 1).unsqueeze(2), eps=self._eps
        )

    def round(self, x: Tensor | FP8Rows) -> Any:
        return self._product.prepare(_unrounded(x, self._dtype))

    def gelu(self, layer: nn.Module, x: Any) -> Any:
        return self._product.prepare_gelu(layer(x))


class RoundedWithExact:
    """Inputs in 4 bits together with their exact values, for layers of which some have a branch."""

    def __init__(self, exact: Unrounded, product: W4A4) -> None:
        self._exact, self._product = exact, product

    def norm(self, stream: ResidualStream, multiplier: Tensor, shift: Tensor) -> InputPair:
        return self._pair(self._exact.norm(stream, multiplier, shift))

    def round(self, x: Tensor | FP8Rows) -> InputPair:
        return self._pair(self._exact.round(x))

    def gelu(self, layer: nn.Module, x: Any) -> InputPair:
        return self._pair(self._exact.gelu(layer, x))

    def _pair(self, x: Tensor) -> InputPair:
        return InputPair(self._product.prepare(x), x)


def _weight(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """Return the weight with which a layer multiplies unrounded inputs; None if it rounds them or has a branch."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    if isinstance(layer, NVFP4Linear) and isinstance(layer.product, W4A16) and layer.branch is None:
        return layer.product.unpacked(layer.quantized_weight, dtype)
    return None


def _unrounded(x: Tensor | FP8Rows, dtype: torch.dtype) -> Tensor:
    if isinstance(x, Tensor):
        return x
    return (x.values.float() * x.scales.unsqueeze(-1)).to(dtype)


def inputs_of(readers: list[nn.Module], operations: NormOperations, dtype: torch.dtype, *, eps: float) -> Inputs:
    """Return the computation of an input that all of these layers read. dtype: dtype of the model."""
    fp8 = [reader.operations for reader in readers if isinstance(reader, FP8Linear)]
    if len(fp8) == len(readers):
        return RoundedToFP8(operations, eps, fp8[0])
    packed = [reader for reader in readers if isinstance(reader, NVFP4Linear)]
    if len(packed) < len(readers) or not isinstance(product := packed[0].product, W4A4):
        return Unrounded(operations, eps, dtype)
    if any(reader.branch is not None for reader in packed):
        return RoundedWithExact(Unrounded(operations, eps, dtype), product)
    return RoundedToNVFP4(operations, eps, dtype, product)
