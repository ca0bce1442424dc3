"""The causal transformer for streaming: the same weights, arranged for speed, with a past that stays where it is.

What lies between two products is one pass over memory: sum, norm, modulation and rounding; norm, rotation and the way
into the cache. Everything that changes from step to step is a tensor that stays in place, so on CUDA a step is one
recorded graph for each number of slots in use. Nothing is ever read back.

Several ranks may share a chunk: then frames and tokens of a pass are those of the rank, and in self-attention the heads
are; see `longvideo.streaming.parallel`.

Shapes: B samples, C channels, T latent frames, L tokens, D model dim, N heads, K head dim, S slots, P prompts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from longvideo.kernels.backends import norm_operations
from longvideo.kernels.fp8.format import FP8Rows
from longvideo.model.attention import attend, preferred_attention
from longvideo.model.cache import ChunkWindow
from longvideo.model.layout import TokenLayout
from longvideo.model.rope import rope_from_positions
from longvideo.quantization.fp8 import VALUES, FP8Linear
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.streaming.attention import slot_attention
from longvideo.streaming.inputs import Inputs, inputs_of
from longvideo.streaming.parallel import Sharing, sharing_of
from longvideo.streaming.slots import NVFP4Slots, PlainSlots, Slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup

    from longvideo.model.spec import ChunkSpec
    from longvideo.model.transformer import Block, CausalTransformer, TextContext


class PassKind(Enum):
    """What a pass is for: the velocity; the velocity, and the chunk is kept as it is; only to keep the chunk."""

    STEP = auto()
    LAST_STEP = auto()
    FILL = auto()


class StreamingTransformer:
    """A `Denoiser` (see `longvideo.rollout`) for inference, on any device and with any kind of products."""

    def __init__(
        self,
        model: CausalTransformer,
        spec: ChunkSpec,
        *,
        batch: int,
        kv_cache: str = "bf16",
        attention: str = "bf16",
        group: ProcessGroup | None = None,
    ):
        """Take a model over: the projections of q, k and v are laid one behind the other, as one product reads them.

        kv_cache: "bf16" (what attention reads) or "nvfp4". attention: "bf16" (the model's dtype), "fp8", or on a CPU
        "fp8-emulated".
        group: ranks that make every chunk together, each with its share of the cache; all hold the model, are called
        alike and get the whole velocity.
        Raises UserError where FP8 attention cannot run, and for a group whose ranks do not divide the heads and the
        frames of a chunk.
        """
        config, weight = model.config, model.patch_embedding.weight
        self.device = weight.device
        self._model, self.spec, self._eps = model, spec, config.eps
        _, p, q = config.patch_size
        self.latent_shape = (batch, config.in_channels, spec.chunk_frames, p * spec.grid_height, q * spec.grid_width)
        heads, head_dim, tokens = config.num_attention_heads, config.attention_head_dim, spec.tokens_per_chunk
        self._norm = norm_operations(self.device)
        self._sharing = sharing_of(group, self.device, chunk_frames=spec.chunk_frames, heads=heads, head_dim=head_dim)
        own_heads = heads // self._sharing.ranks
        blocks = cast("list[Block]", list(model.blocks))
        self._blocks = [_StreamingBlock(block, eps=config.eps) for block in blocks]
        self._modulation = torch.cat([block.modulation.detach() for block in blocks]).float()
        self._head_inputs = inputs_of([model.head.head], self.device, weight.dtype, eps=config.eps)
        self._window = ChunkWindow(spec)
        self._attend = slot_attention(attention, self.device, weight.dtype)
        self._means: _ValueMeans | None = None
        if attention in FP8_FORMATS:
            self._means = _ValueMeans(config.num_layers, heads, head_dim, self._sharing, self.device)
        new_slots = NVFP4Slots if kv_cache == "nvfp4" else PlainSlots
        self._slots: Slots = new_slots(
            spec,
            layers=config.num_layers,
            batch=batch,
            heads=own_heads,
            head_dim=head_dim,
            dtype=self._attend.dtype,
            device=self.device,
        )
        self._position_L3 = TokenLayout.one_chunk(spec, 0).position_BL3[0].to(self.device)
        with torch.inference_mode():
            self._velocity = torch.zeros(self.latent_shape, device=self.device)
            self._latents = torch.zeros_like(self._sharing.own(self._velocity, 2))
            self._sigma = torch.zeros(batch, self._latents.shape[2], device=self.device)
            self._cos_LH, self._sin_LH = torch.zeros(2, tokens, head_dim // 2, device=self.device).unbind()
            self._own_cos_LH, self._own_sin_LH = (self._sharing.own(x, 0) for x in (self._cos_LH, self._sin_LH))
            text = (config.num_layers, 2, batch, config.text_len, heads, head_dim)
            self._text = torch.zeros(text, dtype=weight.dtype, device=self.device)
            self._rotated = torch.zeros(
                batch, tokens, own_heads, head_dim, dtype=self._attend.dtype, device=self.device
            )
        self._graphs: dict[tuple[PassKind, int], torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool: Any = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of this rank's cache that grow with layers and slots; not what all layers share."""
        return self._slots.num_bytes

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget everything: the next chunk is the first of a video."""
        self._window = ChunkWindow(self.spec)

    @torch.inference_mode()
    def begin(self, index: int, *, shot: int, text: TextContext) -> None:
        """Turn to chunk `index`, `shot` cuts after the start; text: the prompt of every sample, in their order."""
        self._window.skip_to(index)
        past = self._window.past_slots()
        start = index * self.spec.chunk_frames + shot * self.spec.offset_per_shot
        with self._here():
            offset = torch.zeros_like(self._position_L3)
            offset[:, 0] = start
            rope = rope_from_positions((self._position_L3 + offset)[None], 2 * self._cos_LH.shape[1])
            self._cos_LH.copy_(rope.cos[0, :, 0])
            self._sin_LH.copy_(rope.sin[0, :, 0])
            self._slots.begin(self._window.begin(), past, self._cos_LH, self._sin_LH)
            for own, keys, values in zip(self._text, text.keys, text.values, strict=True):
                own[0].copy_(keys)
                own[1].copy_(values)

    @torch.inference_mode()
    def velocity(self, latents_BCTHW: Tensor, sigma_BT: Tensor, *, keep: bool = False) -> Tensor:
        """Return the velocity of the live chunk, float32. keep: later chunks shall look at what this pass saw of it."""
        with self._here():
            self._latents.copy_(self._sharing.own(latents_BCTHW, 2))
            self._sigma.copy_(self._sharing.own(sigma_BT, 1))
            self._run(PassKind.LAST_STEP if keep else PassKind.STEP)
            return self._velocity.clone()

    @torch.inference_mode()
    def fill(self, latents_BCTHW: Tensor) -> None:
        """Run the clean pass over the finished live chunk, at which later chunks then look."""
        with self._here():
            self._latents.copy_(self._sharing.own(latents_BCTHW, 2))
            self._sigma.zero_()
            self._run(PassKind.FILL)

    def commit(self, *, cut: bool = False) -> None:
        """Make the live chunk part of the past. cut: it opened a shot."""
        self._window.commit(cut=cut)

    @torch.inference_mode()
    def warm_up(self, *, clean_pass: bool = True) -> None:
        """Compile, choose and record everything that a video without an end runs. Forgets the video before."""
        self.reset()
        for _ in range(self.spec.window_chunks):
            with self._here():
                self._slots.begin(self._window.begin(), self._window.past_slots(), self._cos_LH, self._sin_LH)
                for kind in (PassKind.STEP, PassKind.FILL) if clean_pass else (PassKind.STEP, PassKind.LAST_STEP):
                    self._run(kind)
            self._window.commit()
        self.reset()

    def _here(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _run(self, kind: PassKind) -> None:
        num_slots = self._window.num_slots
        if self._stream is None:
            self._compute(kind, num_slots)
        elif (graph := self._graphs.get((kind, num_slots))) is not None:
            graph.replay()
        else:
            self._record(kind, num_slots)

    def _record(self, kind: PassKind, num_slots: int) -> None:
        """Run a pass once, so that libraries choose and kernels compile, then record it for the next time."""
        assert self._stream is not None
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._compute(kind, num_slots)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a video is decoded in another thread
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._compute(kind, num_slots)
        self._pool = graph.pool()
        self._graphs[kind, num_slots] = graph

    def _compute(self, kind: PassKind, num_slots: int) -> None:
        with preferred_attention(self.device):
            self._pass(kind, num_slots)

    def _pass(self, kind: PassKind, num_slots: int) -> None:
        model, last = self._model, len(self._blocks) - 1
        h_BLD, time_BTSD, time_BTS6D = model.embed(self._latents, self._sigma)
        table = self._modulation[:, None, None] + time_BTS6D[:, :, 0].float()
        table[..., 1::3, :] += 1  # the two scales
        update, gate = None, None
        for layer, block in enumerate(self._blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = table[layer].unbind(2)
            x = block.before_self.norm(h_BLD, update, gate, scale1, shift1)
            q_BLNK, k_BLNK, v_BLNK = block.project(x)
            keys_BSLNK, values_BSLNK = self._slots.opened(layer, num_slots - 1)
            attention, mean_NK, mean_out_D = block.module.self_attn, None, None
            if self._means is not None:
                if num_slots == 1:
                    self._means.set(layer, v_BLNK, attention.o, block.before_out)
                mean_NK, mean_out_D = self._means.values[layer], self._means.outputs[layer]
            self._sharing.rotary.norm_rotate_keep(
                q_BLNK,
                k_BLNK,
                v_BLNK,
                attention.norm_q.weight,
                attention.norm_k.weight,
                self._own_cos_LH,
                self._own_sin_LH,
                self._slots.live,
                self._rotated,
                keys_BSLNK,
                values_BSLNK,
                eps=self._eps,
                mean_NK=mean_NK,
            )
            if kind is not PassKind.STEP and self._slots.copies:
                kept = torch.empty_like(k_BLNK, memory_format=torch.contiguous_format)
                self._norm.rms_norm(k_BLNK.flatten(2), attention.norm_k.weight, kept.flatten(2), eps=self._eps)
                values = v_BLNK if mean_NK is None else (v_BLNK - mean_NK).to(kept.dtype)
                self._slots.keep(layer, *self._sharing.heads(kept, values))
            if kind is PassKind.FILL and layer == last:
                return
            attended = self._attend(self._rotated, keys_BSLNK, values_BSLNK, num_slots)
            update = attention.o(block.before_out.round(self._sharing.tokens(attended)))

            x = block.before_cross.norm(h_BLD, update, gate1, *block.cross_norm, bias_D=mean_out_D)
            cross = block.module.cross_attn
            q = cross.q(x)
            self._norm.rms_norm(q, cross.norm_q.weight, q, eps=self._eps)
            attended = attend(q.unflatten(-1, k_BLNK.shape[2:]), *self._text[layer]).flatten(2)
            update = cross.o(block.before_cross_out.round(attended))

            x = block.before_up.norm(h_BLD, update, None, scale2, shift2)
            up, _, down = block.module.ffn
            update, gate = down(block.before_down.gelu(up, x)), gate2
        shift, scale = (model.head.modulation.float() + time_BTSD[:, :, 0].float().unsqueeze(-2)).unbind(-2)
        x = self._head_inputs.norm(h_BLD, update, gate, 1 + scale, shift)
        patches = self._sharing.whole(model.head.head(x).float())
        self._velocity.copy_(model.unpatch(patches, self._velocity.shape))


class _ValueMeans:
    """What is taken off the values of a video before they are rounded, and put back behind attention.

    Attention's weights sum to one, so it is the same; but FP8 products on Hopper add with 13 bits of mantissa and cut
    off the rest, which among many keys loses a large part of whatever values have in common ("smooth V",
    SageAttention2, arXiv 2411.10958). It is the mean of the first chunk, and most of that of every later one.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, sharing: Sharing, device: torch.device):
        self._sharing = sharing
        self.values = torch.zeros(layers, heads, head_dim, device=device)
        self.outputs = torch.zeros(layers, heads * head_dim, device=device)

    def set(self, layer: int, v_BLNK: Tensor, out: nn.Module, inputs: Inputs) -> None:
        """Take the mean of a layer's values over all samples and tokens. out: what reads attention's result."""
        mean = self._sharing.mean(v_BLNK.float().mean((0, 1)))
        self.values[layer].copy_(mean)
        if isinstance(out, FP8Linear):
            weight = out.quantized_weight
            product = (weight.values.float() @ mean.flatten()) * weight.scales
        else:
            row = mean.flatten().to(v_BLNK.dtype).view(1, 1, -1)
            product = out(inputs.round(row)).flatten().float() - cast("Tensor", out.bias).float()
        self.outputs[layer].copy_(product)


class _StreamingBlock:
    """A block, with what makes the inputs of its products, and with one product for q, k and v where there can be."""

    def __init__(self, block: Block, *, eps: float):
        def inputs(*readers: nn.Module) -> Inputs:
            return inputs_of(list(readers), block.modulation.device, block.modulation.dtype, eps=eps)

        own, cross, ffn = block.self_attn, block.cross_attn, block.ffn
        self.module = block
        self.before_self = inputs(own.q, own.k, own.v)
        self.before_out = inputs(own.o)
        self.before_cross, self.before_cross_out = inputs(cross.q), inputs(cross.o)
        self.before_up, self.before_down = inputs(ffn[0]), inputs(ffn[2])
        assert block.norm3.weight is not None and block.norm3.bias is not None
        self.cross_norm = (block.norm3.weight.detach(), block.norm3.bias.detach())
        self._joined = _joined([own.q, own.k, own.v])

    def project(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v [B, L, N, K]; tokens may lie apart."""
        own = self.module.self_attn
        parts = self._joined(x).chunk(3, dim=-1) if self._joined is not None else (own.q(x), own.k(x), own.v(x))
        q, k, v = (part.unflatten(-1, (own.num_heads, -1)) for part in parts)
        return q, k, v


def _joined(layers: Sequence[nn.Module]) -> nn.Module | None:
    """Return one layer that makes the outputs of several, side by side; their weights become views of its own."""
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
        eights = cast("Sequence[FP8Linear]", layers)
        # as bytes: not every operation knows the dtype
        values = _side_by_side([layer.quantized_weight.values.view(torch.uint8) for layer in eights])
        whole = FP8Rows(
            values.view(torch.float8_e4m3fn), torch.cat([layer.quantized_weight.scales for layer in eights])
        )
        bias = torch.cat([layer.get_buffer("bias") for layer in eights])
        for layer, part in zip(eights, whole.values.chunk(3), strict=True):
            setattr(layer, VALUES, part)
        return FP8Linear(whole, bias)
    return None


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Return tensors as one, without a copy where they lie so already: several transformers may take a model over."""
    first = parts[0]
    lie_so = all(
        part.is_contiguous()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + index * first.numel()
        for index, part in enumerate(parts)
    )
    if not lie_so:
        return torch.cat(parts)
    return first.as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride(), first.storage_offset())
