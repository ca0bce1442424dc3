"""A block of the streaming transformer: the layers of a block of the model, with the inputs of their products.

Shapes: B samples, L tokens, D model dim, T latent frames, N heads, K head dim, P prompts, J text positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from longvideo.kernels.fp8.format import FP8Rows
from longvideo.model.attention import attend
from longvideo.quantization.fp8 import VALUES, FP8Linear
from longvideo.streaming.inputs import Inputs, ResidualStream, inputs_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.kernels.backends import NormOperations
    from longvideo.model.transformer import Block


class StreamingBlock:
    """The layers of a block, what makes the inputs of their products, and one product for q, k and v where possible."""

    def __init__(self, block: Block, operations: NormOperations, *, eps: float) -> None:
        def inputs(*readers: nn.Module) -> Inputs:
            return inputs_of(list(readers), operations, block.modulation.dtype, eps=eps)

        self._block, self._operations, self._eps = block, operations, eps
        own, cross, ffn = block.self_attn, block.cross_attn, block.ffn
        self.norm_q_D, self.norm_k_D = own.norm_q.weight, own.norm_k.weight
        self._before_self, self._before_out = inputs(own.q, own.k, own.v), inputs(own.o)
        self._before_cross, self._before_cross_out = inputs(cross.q), inputs(cross.o)
        self._before_up, self._before_down = inputs(ffn[0]), inputs(ffn[2])
        assert block.norm3.weight is not None and block.norm3.bias is not None
        self._cross_norm = (block.norm3.weight.detach(), block.norm3.bias.detach())
        self._joined = _joined([own.q, own.k, own.v])

    def project(self, stream: ResidualStream, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, L, N, K] before norm and rotation; their tokens may not be contiguous."""
        own, x = self._block.self_attn, self._before_self.norm(stream, scale, shift)
        parts = self._joined(x).chunk(3, dim=-1) if self._joined is not None else (own.q(x), own.k(x), own.v(x))
        q_BLNK, k_BLNK, v_BLNK = (part.unflatten(-1, (own.num_heads, -1)) for part in parts)
        return q_BLNK, k_BLNK, v_BLNK

    def normed_keys(self, k_BLNK: Tensor) -> Tensor:
        """Return contiguous keys, normalized over all heads and not rotated."""
        out = torch.empty_like(k_BLNK, memory_format=torch.contiguous_format)
        self._operations.rms_norm(k_BLNK.flatten(2), self.norm_k_D, out.flatten(2), eps=self._eps)
        return out

    def out_of_attention(self, attended_BLD: Tensor | FP8Rows) -> Tensor:
        """Return the projection of the result of self-attention."""
        return self._block.self_attn.o(self._before_out.round(attended_BLD))

    def attend_to_text(self, stream: ResidualStream, text: Tensor) -> Tensor:
        """Return the update of cross-attention. text: keys and values of the prompts, [2, P, J, N, K]."""
        cross = self._block.cross_attn
        q_BLD = cross.q(self._before_cross.norm(stream, *self._cross_norm))
        self._operations.rms_norm(q_BLD, cross.norm_q.weight, q_BLD, eps=self._eps)
        attended_BLD = attend(q_BLD.unflatten(-1, (cross.num_heads, -1)), *text).flatten(2)
        return cross.o(self._before_cross_out.round(attended_BLD))

    def feed_forward(self, stream: ResidualStream, scale: Tensor, shift: Tensor) -> Tensor:
        """Return the update of the feed-forward layers."""
        up, _, down = self._block.ffn
        x = self._before_up.norm(stream, scale, shift)
        return down(self._before_down.gelu(up, x))

    def project_mean(self, mean_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the output projection of a mean of values [N, K], without its bias: [D] in float32."""
        out = self._block.self_attn.o
        if isinstance(out, FP8Linear):
            weight = out.quantized_weight
            return (weight.values.float() @ mean_NK.flatten()) * weight.scales
        row = mean_NK.flatten().to(dtype).view(1, 1, -1)
        return self.out_of_attention(row).flatten().float() - cast("Tensor", out.bias).float()


def _joined(layers: Sequence[nn.Module]) -> nn.Module | None:
    """Return one layer with the outputs of several, or None where they cannot be joined.

    The weights of the layers become views of its own.
    """
    if all(isinstance(layer, nn.Linear) for layer in layers):
        linears = cast("Sequence[nn.Linear]", layers)
        joined = nn.Linear(linears[0].in_features, 3 * linears[0].out_features, device="meta")
        for name in ("weight", "bias"):
            whole = _side_by_side([layer.get_parameter(name).detach() for layer in linears])
            setattr(joined, name, nn.Parameter(whole, requires_grad=False))
            for layer, part in zip(linears, whole.chunk(3), strict=True):
                setattr(layer, name, nn.Parameter(part, requires_grad=False))
        return joined
    if all(isinstance(layer, FP8Linear) for layer in layers):
        fp8_layers = cast("Sequence[FP8Linear]", layers)
        # as bytes: not every operation supports the dtype
        values = _side_by_side([layer.quantized_weight.values.view(torch.uint8) for layer in fp8_layers])
        whole = FP8Rows(
            values.view(torch.float8_e4m3fn), torch.cat([layer.quantized_weight.scales for layer in fp8_layers])
        )
        bias = torch.cat([layer.get_buffer("bias") for layer in fp8_layers])
        for layer, part in zip(fp8_layers, whole.values.chunk(3), strict=True):
            setattr(layer, VALUES, part)
        return FP8Linear(whole, bias)
    return None


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Return tensors as one, without a copy where they are adjacent already: several transformers may share a model."""
    first = parts[0]
    are_adjacent = all(
        part.is_contiguous()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + index * first.numel()
        for index, part in enumerate(parts)
    )
    if not are_adjacent:
        return torch.cat(parts)
    return first.as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride(), first.storage_offset())
