"""The causal transformer for streaming: the same weights, arranged for speed.

Between two products there is one pass over memory: sum, norm, modulation and rounding, or norm, rotation and the write
to the cache. Everything that changes from step to step is a tensor at a fixed address, so on CUDA a step is one
recorded graph for each fill level. The host reads nothing back.

Several ranks may share a chunk. A pass then has the rank's share of the frames and tokens, and in self-attention its
share of the heads; see `longvideo.streaming.parallel`.

Shapes: B samples, C channels, T latent frames, L tokens, D model dim, N heads, K head dim, S slots, P prompts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from longvideo.kernels.attention.sdpa import preferred_attention
from longvideo.kernels.backends import norm_operations
from longvideo.model.cache import CACHES, ChunkWindow
from longvideo.model.layout import TokenLayout
from longvideo.model.rope import rope_from_positions
from longvideo.model.slots import CacheSizes
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.streaming.attention import slot_attention
from longvideo.streaming.block import StreamingBlock
from longvideo.streaming.inputs import ResidualStream, inputs_of
from longvideo.streaming.parallel import Sharing, sharing_of
from longvideo.streaming.recording import GraphRecorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

    from longvideo.kernels.backends import AttentionPrecision
    from longvideo.model.cache import CachePrecision
    from longvideo.model.slots import Slots
    from longvideo.model.spec import ChunkSpec
    from longvideo.model.transformer import Block, CausalTransformer, TextContext


class PassKind(Enum):
    """Purpose of a pass: STEP computes the velocity, LAST_STEP also stores the chunk, FILL only stores the chunk."""

    STEP = auto()
    LAST_STEP = auto()
    FILL = auto()


class StreamingTransformer:
    """A `Denoiser` (see `longvideo.rollout`) for inference, on any device and with any products."""

    def __init__(
        self,
        model: CausalTransformer,
        spec: ChunkSpec,
        *,
        batch: int,
        kv_cache: CachePrecision = "bf16",
        attention: AttentionPrecision = "bf16",
        group: ProcessGroup | None = None,
        recorder: GraphRecorder | None = None,
    ) -> None:
        """Arrange a model in place: the weights of q, k and v are stored one after the other, for one product.

        batch: number of samples, with the copies for guidance.
        kv_cache: number format of the cache; "bf16" is the dtype of attention.
        attention: number format of attention; "bf16" is the dtype of the model.
        group: ranks that compute every chunk together, each with its part of the cache. All have the model, receive the
            same calls and return the whole velocity.
        recorder: recorder of the graphs on CUDA; None means one of its own. Without effect where the weights of the
            blocks are in host memory: no graph is recorded then.
        Raises UserError where FP8 attention cannot run, and for a group whose ranks do not divide the heads and the
        frames of a chunk.
        """
        config, weight = model.config, model.patch_embedding.weight
        self.device = weight.device
        self._model, self.spec, self._eps = model, spec, config.eps
        _, p, q = config.patch_size
        self.latent_shape = (batch, config.in_channels, spec.chunk_frames, p * spec.grid_height, q * spec.grid_width)
        heads, head_dim, tokens = config.num_attention_heads, config.attention_head_dim, spec.tokens_per_chunk
        operations = norm_operations(self.device)
        self._sharing = sharing_of(group, self.device, chunk_frames=spec.chunk_frames, heads=heads, head_dim=head_dim)
        own_heads = heads // self._sharing.ranks
        with model.in_turn() as blocks:
            self._blocks = [StreamingBlock(block, operations, eps=config.eps) for block in blocks]
        modulations = [cast("Block", block).modulation.detach() for block in model.blocks]
        self._modulation = torch.cat(modulations).float()
        self._head_inputs = inputs_of([model.head.head], operations, weight.dtype, eps=config.eps)
        self._window = ChunkWindow(spec)
        self._attend = slot_attention(attention, self.device, weight.dtype)
        self._means: _ValueMeans | None = None
        if attention in FP8_FORMATS:
            self._means = _ValueMeans(config.num_layers, heads, head_dim, self._sharing, self.device)
        sizes = CacheSizes(spec, config.num_layers, own_heads, head_dim, batch, self._attend.dtype, self.device)
        self._slots: Slots = CACHES[kv_cache].slots_type(sizes)
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
        records = self.device.type == "cuda" and model.block_weights.recordable
        self._recorder = (recorder or GraphRecorder(self.device)) if records else None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of this rank that grow with layers and slots, without what all layers share."""
        return self._slots.num_bytes

    @torch.inference_mode()
    def reset(self) -> None:
        """Remove the past: the next chunk is the first of a video."""
        self._window = ChunkWindow(self.spec)

    @torch.inference_mode()
    def begin(self, index: int, *, shot: int, text: TextContext) -> None:
        """Begin chunk `index`.

        shot: number of cuts before it or at it. text: prompt of every sample, in their order.
        """
        self._window.skip_to(index)
        start = index * self.spec.chunk_frames + shot * self.spec.offset_per_shot
        with self._here():
            offset = torch.zeros_like(self._position_L3)
            offset[:, 0] = start
            rope = rope_from_positions((self._position_L3 + offset)[None], 2 * self._cos_LH.shape[1])
            self._cos_LH.copy_(rope.cos[0, :, 0])
            self._sin_LH.copy_(rope.sin[0, :, 0])
            slots = self._window.slots()
            self._slots.begin(slots)
            self._slots.set_rotation(slots.live, self._cos_LH, self._sin_LH)
            for own, keys, values in zip(self._text, text.keys, text.values, strict=True):
                own[0].copy_(keys)
                own[1].copy_(values)

    @torch.inference_mode()
    def velocity(self, latents_BCTHW: Tensor, sigma_BT: Tensor, *, keep: bool = False) -> Tensor:
        """Return the velocity of the live chunk, float32.

        keep: whether later chunks attend to the keys and values of this pass.
        """
        with self._here():
            self._latents.copy_(self._sharing.own(latents_BCTHW, 2))
            self._sigma.copy_(self._sharing.own(sigma_BT, 1))
            self._run(PassKind.LAST_STEP if keep else PassKind.STEP)
            return self._velocity.clone()

    @torch.inference_mode()
    def fill(self, latents_BCTHW: Tensor) -> None:
        """Run the clean pass over the finished live chunk, to whose keys and values later chunks attend."""
        with self._here():
            self._latents.copy_(self._sharing.own(latents_BCTHW, 2))
            self._sigma.zero_()
            self._run(PassKind.FILL)

    def commit(self, *, cut: bool = False) -> None:
        """Make the live chunk part of the past. cut: whether it opened a shot."""
        self._window.commit(cut=cut)

    @torch.inference_mode()
    def warm_up(self, *, clean_pass: bool = True) -> None:
        """Compile kernels and record the graphs of all fill levels. Removes the past."""
        self.reset()
        for _ in range(self.spec.window_chunks):
            with self._here():
                self._slots.begin(self._window.slots())
                for kind in (PassKind.STEP, PassKind.FILL) if clean_pass else (PassKind.STEP, PassKind.LAST_STEP):
                    self._run(kind)
            self._window.commit()
        self.reset()

    def _here(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _run(self, kind: PassKind) -> None:
        key = kind, self._window.num_slots
        compute = partial(self._compute, *key)
        if self._recorder is None:
            compute()
        elif (graph := self._graphs.get(key)) is not None:
            graph.replay()
        else:
            self._graphs[key] = self._record(compute, self._recorder)

    def _record(self, compute: Callable[[], None], recorder: GraphRecorder) -> torch.cuda.CUDAGraph:
        """Return the graph of a pass, after one run in which libraries choose kernels and Triton compiles."""
        current, own = torch.cuda.current_stream(self.device), recorder.stream
        own.wait_stream(current)
        with torch.cuda.stream(own):
            compute()
        current.wait_stream(own)
        graph, _ = recorder.record(compute)
        return graph

    def _compute(self, kind: PassKind, num_slots: int) -> None:
        with preferred_attention(self.device):
            self._pass(kind, num_slots)

    def _pass(self, kind: PassKind, num_slots: int) -> None:
        """Run the model over the live chunk, block by block: attention to the slots, to the text, feed-forward."""
        h_BLD, time_BTSD, time_BTS6D = self._model.embed(self._latents, self._sigma)
        stream, modulation = ResidualStream(h_BLD), self._modulation_of(time_BTS6D)
        with self._model.in_turn() as loaded:
            for layer, (block, _) in enumerate(zip(self._blocks, loaded, strict=True)):
                shift1, scale1, gate1, shift2, scale2, gate2 = modulation[layer].unbind(2)
                q_BLNK, k_BLNK, v_BLNK = block.project(stream, scale1, shift1)
                mean_NK, mean_out_D = self._value_mean(layer, v_BLNK, is_first_chunk=num_slots == 1)
                keys_BSLNK, values_BSLNK = self._slots.open(layer, num_slots - 1)
                self._write_live_slot(block, q_BLNK, k_BLNK, v_BLNK, keys_BSLNK, values_BSLNK, mean_NK)
                if kind is not PassKind.STEP and self._slots.copies:
                    self._keep(layer, k_BLNK, v_BLNK, mean_NK)
                if kind is PassKind.FILL and layer == len(self._blocks) - 1:
                    return
                attended = self._sharing.tokens(self._attend(self._rotated, keys_BSLNK, values_BSLNK, num_slots))
                stream.add(block.out_of_attention(attended), gate1, mean_out_D)
                stream.add(block.attend_to_text(stream, self._text[layer]), None)
                stream.add(block.feed_forward(stream, scale2, shift2), gate2)
        self._velocity.copy_(self._head(stream, time_BTSD))

    def _modulation_of(self, time_BTS6D: Tensor) -> Tensor:
        """Return shifts, scales plus one, and gates of all blocks: [layers, B, T, 6, D] in float32."""
        table = self._modulation[:, None, None] + time_BTS6D[:, :, 0].float()
        table[..., 1::3, :] += 1  # the two scales
        return table

    def _value_mean(self, layer: int, v_BLNK: Tensor, *, is_first_chunk: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the mean to subtract from the values of a layer, and its output projection; None without FP8."""
        if self._means is None:
            return None, None
        if is_first_chunk:
            self._means.set(layer, v_BLNK, self._blocks[layer])
        return self._means.values[layer], self._means.outputs[layer]

    def _write_live_slot(
        self,
        block: StreamingBlock,
        q_BLNK: Tensor,
        k_BLNK: Tensor,
        v_BLNK: Tensor,
        keys_BSLNK: Tensor,
        values_BSLNK: Tensor,
        mean_NK: Tensor | None,
    ) -> None:
        """Write normalized, rotated queries to `_rotated`, and keys and values of the live chunk to its slot."""
        self._sharing.rotary.norm_rotate_keep(
            q_BLNK,
            k_BLNK,
            v_BLNK,
            block.norm_q_D,
            block.norm_k_D,
            self._own_cos_LH,
            self._own_sin_LH,
            self._slots.live,
            self._rotated,
            keys_BSLNK,
            values_BSLNK,
            eps=self._eps,
            mean_NK=mean_NK,
        )

    def _keep(self, layer: int, k_BLNK: Tensor, v_BLNK: Tensor, mean_NK: Tensor | None) -> None:
        """Store keys before rotation and values of the live chunk for later chunks."""
        keys_BLNK = self._blocks[layer].normed_keys(k_BLNK)
        values_BLNK = v_BLNK if mean_NK is None else (v_BLNK - mean_NK).to(keys_BLNK.dtype)
        self._slots.keep(layer, *self._sharing.heads(keys_BLNK, values_BLNK))

    def _head(self, stream: ResidualStream, time_BTSD: Tensor) -> Tensor:
        """Return the velocity [B, C, T, H, W] of the whole chunk."""
        head = self._model.head
        shift, scale = (head.modulation.float() + time_BTSD[:, :, 0].float().unsqueeze(-2)).unbind(-2)
        patches = head.head(self._head_inputs.norm(stream, 1 + scale, shift)).float()
        return self._model.unpatch(self._sharing.whole(patches), self._velocity.shape)


class _ValueMeans:
    """Means that are subtracted from the values of a video before they are rounded, and added again after attention.

    The weights of attention sum to one, so the result is the same. But FP8 products on Hopper add with 13 bits of
    mantissa and cut off the rest, which among many keys loses a large part of what the values have in common ("smooth
    V", SageAttention2, arXiv 2411.10958). The mean of the first chunk is most of the mean of every later one.

    values: [layers, N, K]. outputs: the means after the output projection, [layers, D].
    """

    def __init__(self, layers: int, heads: int, head_dim: int, sharing: Sharing, device: torch.device) -> None:
        self._sharing = sharing
        self.values = torch.zeros(layers, heads, head_dim, device=device)
        self.outputs = torch.zeros(layers, heads * head_dim, device=device)

    def set(self, layer: int, v_BLNK: Tensor, block: StreamingBlock) -> None:
        """Set the mean of a layer to that of values over all samples and tokens."""
        mean_NK = self._sharing.mean(v_BLNK.float().mean((0, 1)))
        self.values[layer].copy_(mean_NK)
        self.outputs[layer].copy_(block.project_mean(mean_NK, v_BLNK.dtype))
