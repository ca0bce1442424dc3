"""Properties of the model, its layout and its cache, each against a slow or direct definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from longvideo.errors import ConfigError
from longvideo.model.attention import Blockwise, Cached, Filling, Full, Masked, block_mask
from longvideo.model.cache import ChunkWindow, KVCache, visible_chunks
from longvideo.model.config import PRESETS
from longvideo.model.layout import TokenLayout
from longvideo.model.rope import Rope, rope_from_positions, rotate
from longvideo.model.slots import CacheSizes
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from tests.golden import relative_error
from tests.model import small


def cached_rollout(
    model: CausalTransformer, clean: Tensor, noisy: Tensor, sigma: Tensor, spec: ChunkSpec, cuts: list[bool]
) -> Tensor:
    """Return the velocity of every noisy chunk after the clean chunks that the cache still holds."""
    cache = KVCache(model.cache_sizes(spec, batch=1))
    attention, text, shot, out = Cached(cache), model.encode_text(small.features(len(cuts))), 0, []
    for chunk, cut in enumerate(cuts):
        shot += cut and chunk > 0
        frames = slice(chunk * spec.chunk_frames, (chunk + 1) * spec.chunk_frames)
        layout = TokenLayout.one_chunk(spec, chunk, shot=shot)
        own = text.select(torch.tensor([chunk]))
        out.append(model(noisy[:, :, frames], sigma[:, frames], own, rope=model.rope(layout), attention=attention))
        zero = torch.zeros(1, spec.chunk_frames)
        model.fill_cache(clean[:, :, frames], zero, own, rope=model.rope(layout), attention=Filling(cache))
        cache.commit(cut=cut)
    return torch.cat(out, 2)


def masked_pass(
    model: CausalTransformer, clean: Tensor, noisy: Tensor, sigma: Tensor, spec: ChunkSpec, cuts: list[bool]
) -> Tensor:
    """Return the same velocities from one teacher-forcing pass."""
    layout = TokenLayout.teacher_forcing(spec, len(cuts), [cut and i > 0 for i, cut in enumerate(cuts)])
    text = model.encode_text(small.features(len(cuts))).select(torch.arange(len(cuts)).repeat(2))
    attention = Masked(layout, visible_chunks(spec, cuts))
    sigma = torch.cat((torch.zeros_like(sigma), sigma), 1)
    flow = model(torch.cat((clean, noisy), 2), sigma, text, rope=model.rope(layout), attention=attention)
    return flow[:, :, clean.shape[2] :]


@pytest.mark.parametrize(
    ("changes", "cut_chunks"),
    [
        ({"window_frames": 18, "sink_frames": 0}, ()),
        ({"window_frames": 6, "sink_frames": 2}, ()),
        ({"window_frames": 6, "sink_frames": 0, "pin_shots": True, "offset_per_shot": 3}, (2, 5)),
        ({"window_frames": 8, "sink_frames": 2, "pin_shots": True, "offset_per_shot": 8}, (3, 6)),
    ],
)
@torch.no_grad()
def test_cached_rollout_equals_masked_pass(changes: dict, cut_chunks: tuple[int, ...]) -> None:
    spec, num_chunks = dataclasses.replace(small.SPEC, **changes), 9
    cuts = [chunk in cut_chunks for chunk in range(num_chunks)]
    clean, noisy = small.latents(num_chunks, seed=3), small.latents(num_chunks, seed=4)
    sigma = torch.rand(1, num_chunks).repeat_interleave(spec.chunk_frames, 1)
    model = small.model()
    got, expected = (f(model, clean, noisy, sigma, spec, cuts) for f in (cached_rollout, masked_pass))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("frame_prompts", [False, True])
@torch.no_grad()
def test_permuted_layout_changes_nothing(frame_prompts: bool) -> None:
    spec, num_chunks, model = small.SPEC, 4, small.model()
    frames = num_chunks * spec.chunk_frames
    layout = TokenLayout.teacher_forcing(spec, num_chunks, [False, True, False, False])
    x = torch.cat((small.latents(num_chunks, seed=3), small.latents(num_chunks, seed=4)), 2)
    sigma = torch.cat((torch.zeros(1, frames), torch.rand(1, frames)), 1)
    text = model.encode_text(small.features(num_chunks))
    index = layout.chunk_L[:: layout.tokens_per_frame]
    expected = model(x, sigma, text.select(index), rope=model.rope(layout), attention=Masked(layout))
    # the order of balanced ranks (clean and noisy copy of the same frames together), then an arbitrary order
    half = frames // 2
    balanced = [f + copy for start in (0, half) for copy in (0, frames) for f in range(start, start + half)]
    order = torch.randperm(2 * frames).tolist() if frame_prompts else balanced
    permuted = layout.permute_frames(order)
    got = model(
        x[:, :, order],
        sigma[:, order],
        text.select(index[order]),
        rope=model.rope(permuted),
        attention=Masked(permuted),
    )
    assert relative_error(got, expected[:, :, order]) < 1e-6


@pytest.mark.parametrize("window_frames", [6, 18])
@torch.no_grad()
def test_blockwise_attention_equals_masked(window_frames: int) -> None:
    spec = dataclasses.replace(small.SPEC, window_frames=window_frames, sink_frames=2)
    visible = visible_chunks(spec, [False] * 5)
    natural = TokenLayout.teacher_forcing(spec, 5)
    q, k, v = torch.randn(3, 2, natural.chunk_L.numel(), 2, 12).unbind(0)
    interleaved = [f + copy for start in range(0, 10, 2) for copy in (0, 10) for f in (start, start + 1)]
    for layout in (natural, natural.permute_frames(interleaved), TokenLayout.block_causal(spec, 10)):
        rope = rope_from_positions(layout.position_BL3, 12)
        table = visible if layout.is_noisy_L.any() else None
        expected, got = (pattern(layout, table)(0, q, k, v, rope) for pattern in (Masked, Blockwise))
        assert relative_error(got, expected) < 1e-6


def test_window_and_sink_equal_their_definition() -> None:
    spec = ChunkSpec(1, 1, chunk_frames=8, window_frames=40, sink_frames=16, pin_shots=False)
    visible = visible_chunks(spec, [False] * 30)
    for live in range(30):
        recent = range(max(0, live - (5 - 2) + 1), live + 1)
        expected = {0, 1} & set(range(live + 1)) | set(recent) if live >= 5 else set(range(live + 1))
        assert set(visible[live].nonzero().flatten().tolist()) == expected


def test_pin_equals_the_reference_trace() -> None:
    """Window 32, sink 8, chunk 8, cuts at chunks 4 and 9: the published rule, derived by hand from the reference."""
    spec = ChunkSpec(1, 1)
    visible = visible_chunks(spec, [chunk in (4, 9) for chunk in range(13)])
    trace = {
        3: [0, 1, 2, 3],
        4: [0, 2, 3, 4],
        5: [0, 3, 4, 5],
        6: [0, 4, 5, 6],
        7: [0, 4, 6, 7],
        8: [0, 4, 7, 8],
        9: [0, 4, 8, 9],
        10: [0, 8, 9, 10],
        11: [0, 9, 10, 11],
        12: [0, 9, 11, 12],
    }
    for chunk, expected in trace.items():
        assert visible[chunk].nonzero().flatten().tolist() == expected, chunk


def test_nothing_is_moved_when_the_window_slides() -> None:
    spec = dataclasses.replace(small.SPEC, window_frames=6, sink_frames=2)
    cache = KVCache(CacheSizes(spec, num_layers=1, num_heads=1, head_dim=2))
    addresses, still = (
        None,
        Rope(torch.ones(1, spec.tokens_per_chunk, 1, 1), torch.zeros(1, spec.tokens_per_chunk, 1, 1)),
    )
    for chunk in range(6):
        value = torch.full((1, spec.tokens_per_chunk, 1, 2), float(chunk))
        keys, values = cache.attended(0, value, value, still)
        addresses = addresses or (keys.data_ptr(), values.data_ptr())
        assert (keys.data_ptr(), values.data_ptr()) == addresses
        held = keys.view(-1, spec.tokens_per_chunk * 2)
        assert (held == held[:, :1]).all(), "a slot holds tokens of two chunks"
        assert sorted(held[:, 0].int().tolist()) == sorted({0, max(chunk - 1, 0), chunk}), chunk
        cache.commit()


def test_window_begin_is_idempotent() -> None:
    window = ChunkWindow(small.SPEC)
    for _ in range(9):
        slots = {window.begin() for _ in range(3)}
        assert len(slots) == 1
        window.commit()


@torch.no_grad()
def test_shot_offset_shifts_time_only_between_shots() -> None:
    spec = dataclasses.replace(small.SPEC, offset_per_shot=5)
    times = TokenLayout.block_causal(spec, 4, [False, True, False, True]).position_BL3[0, :: spec.tokens_per_frame, 0]
    assert times.tolist() == [0, 1, 2 + 5, 3 + 5, 4 + 5, 5 + 5, 6 + 10, 7 + 10]
    per_sample = TokenLayout.block_causal(spec, 2, torch.tensor([[False, False], [False, True]])).position_BL3
    assert per_sample[:, :: spec.tokens_per_frame, 0].tolist() == [[0, 1, 2, 3], [0, 1, 7, 8]]
    assert TokenLayout.one_chunk(spec, 3, shot=2).position_BL3[0, 0, 0] == 6 + 10


@torch.no_grad()
def test_attention_depends_on_distance_alone_however_far() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 5, 2, 12, generator=generator).unbind(0)
    position = torch.randint(0, 9, (1, 5, 3), generator=generator)
    scores = []
    for start in (0, 1023, 10_000_000):
        rope = rope_from_positions(position + torch.tensor([start, 0, 0]), 12)
        scores.append(torch.einsum("blnk,bsnk->bnls", rotate(q, rope), rotate(k, rope)))
    assert relative_error(scores[1], scores[0]) < 1e-6 and relative_error(scores[2], scores[0]) < 1e-5


def test_gradient_flows_to_every_parameter() -> None:
    model, spec, num_chunks = small.model(), small.SPEC, 3
    layout = TokenLayout.teacher_forcing(spec, num_chunks)
    x = torch.cat((small.latents(num_chunks, seed=3), small.latents(num_chunks, seed=4)), 2)
    sigma = torch.rand(1, x.shape[2])
    text = model.encode_text(small.features(num_chunks)).select(torch.arange(num_chunks).repeat(2))
    model(x, sigma, text, rope=model.rope(layout), attention=Masked(layout)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 1e-6, name


def test_no_gradient_through_the_cache() -> None:
    """Under autograd a chunk has the same context, and no gradient reaches an earlier chunk."""
    model, spec = small.model(), small.SPEC
    cache = KVCache(model.cache_sizes(spec, batch=1))
    text = model.encode_text(small.features(1))
    first, second = (small.latents(1, seed=s).requires_grad_() for s in (3, 4))
    sigma = torch.full((1, spec.chunk_frames), 0.5)
    layouts = [TokenLayout.one_chunk(spec, i) for i in (0, 1)]
    model(first, sigma, text, rope=model.rope(layouts[0]), attention=Cached(cache))
    with torch.no_grad():
        model.fill_cache(first, 0 * sigma, text, rope=model.rope(layouts[0]), attention=Filling(cache))
        cache.commit()
        expected = model(second, sigma, text, rope=model.rope(layouts[1]), attention=Cached(cache))
    got = model(second, sigma, text, rope=model.rope(layouts[1]), attention=Cached(cache))
    assert relative_error(got.detach(), expected) < 1e-6
    got.sum().backward()
    assert first.grad is None and second.grad is not None and second.grad.norm() > 0


@pytest.mark.parametrize("per_token", [False, True])
@torch.no_grad()
def test_the_model_equals_that_of_diffusers(per_token: bool) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    from longvideo.checkpoint.names import to_official

    config, spec = small.CONFIG, small.SPEC
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = CausalTransformer(config).eval()
    ours.load_state_dict({to_official(name): value for name, value in theirs.state_dict().items()}, strict=True)
    x, text = small.latents(2, batch=2), small.features(2)
    layout = TokenLayout.block_causal(spec, 2)
    frames, tokens = x.shape[2], layout.chunk_L.numel()
    if per_token:
        timestep = torch.rand(2, tokens) * 1000
        sigma = (timestep / 1000).unflatten(1, (frames, -1))
    else:
        timestep = torch.tensor([311.0, 987.0])
        sigma = (timestep / 1000).unsqueeze(1).expand(2, frames)
    expected = theirs(x, timestep, text, return_dict=False)[0]
    got = ours(x, sigma, ours.encode_text(text), rope=ours.rope(layout), attention=Full())
    assert relative_error(got, expected) < 1e-5


def test_5b_preset_has_the_published_size() -> None:
    with torch.device("meta"):
        model = CausalTransformer(PRESETS["wan2.2-ti2v-5b"])
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 4) == 4.9998
    linears = [m for block in model.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_frames": 12}, "multiple of chunk_frames"),
        ({"window_frames": 8, "sink_frames": 8}, "expected the live chunk in addition to"),
        ({"chunk_frames": 0}, "at least 1"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChunkSpec(**{"grid_height": 4, "grid_width": 7, **changes})


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_a_block_mask_made_of_runs_is_the_one_made_of_pairs(grid: tuple[int, int]) -> None:
    """In the first layout blocks of 16 are within a run; in the second they are not, and the last is partly empty."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    spec = dataclasses.replace(small.SPEC, grid_height=grid[0], grid_width=grid[1], window_frames=6, sink_frames=2)
    layout = TokenLayout.teacher_forcing(spec, 3)
    dense = Masked(layout, visible_chunks(spec, [False, False, True]))._dense_LL
    assert dense is not None
    length, block = dense.shape[0], 16
    kind = layout.chunk_L * 2 + layout.is_noisy_L
    order = kind.unique_consecutive()
    run_L = (kind[:, None] == order[None, :]).int().argmax(1)
    first = (run_L[:, None] == torch.arange(len(order))).int().argmax(0)
    mask = block_mask(run_L, dense[first][:, first], block=block)
    expected = create_block_mask(lambda _b, _h, q, k: dense[q, k], None, None, length, length, "cpu", BLOCK_SIZE=block)

    def tables(block_mask: BlockMask) -> list[set[tuple[int, int]]]:
        pairs = []
        for count, index in (
            (block_mask.kv_num_blocks, block_mask.kv_indices),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
            (block_mask.q_num_blocks, block_mask.q_indices),
            (block_mask.full_q_num_blocks, block_mask.full_q_indices),
        ):
            assert count is not None and index is not None
            rows = enumerate(zip(count[0, 0].tolist(), index[0, 0].tolist(), strict=True))
            pairs.append({(row, column) for row, (many, columns) in rows for column in columns[:many]})
        return pairs

    assert tables(mask) == tables(expected)
    assert mask.shape == expected.shape and bool(tables(mask)[0]) == (length % block > 0)
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), query, key), dense)
