"""The bank of latents, the views drawn from it, and the objective of the transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longvideo.distributed import ParallelConfig
from longvideo.errors import ConfigError
from longvideo.flow.schedule import FlowSchedule
from longvideo.flow.unipc import UniPC
from longvideo.model.attention import Masked
from longvideo.model.config import TransformerConfig
from longvideo.model.layout import TokenLayout
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from longvideo.rollout import CLEAN_CONTEXT, CachedTransformer, ContextLevel, context_level
from longvideo.shapeworld.captions import caption, vocabulary
from longvideo.text.encoder import TextEncoder
from longvideo.train.batch import ViewStage
from longvideo.train.shapeworld.captions import tokenize_captions
from longvideo.train.shapeworld.latent_bank import BankConfig, LatentBank
from longvideo.train.shapeworld.scenes import ScenePool
from longvideo.train.shapeworld.views import ViewConfig, ViewSource
from longvideo.train.teacher_forcing import TeacherForcing, TeacherForcingConfig, runnable
from longvideo.training.engine import LocalEngine
from longvideo.training.objective import seeded
from longvideo.training.optimizer import OptimizerConfig

from .small import CPU, small_autoencoder, small_pool

SPEC = ChunkSpec(grid_height=1, grid_width=2, chunk_frames=2, window_frames=6, sink_frames=0, pin_shots=False)
BANK = BankConfig(clips=8, initial_clips=4, group=2, refresh_every=3, late_fraction=0.0)
TEXT_LEN = 48


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.build_tiny(vocabulary(), text_len=TEXT_LEN)


def small_bank(config: BankConfig = BANK, pool: ScenePool | None = None) -> LatentBank:
    return LatentBank(
        small_autoencoder(), pool or small_pool(), config, chunk_frames=SPEC.chunk_frames, seed=3, precision="fp32"
    )


def view_source(
    encoder: TextEncoder,
    config: ViewConfig,
    bank: BankConfig = BANK,
    *,
    batch: int,
    chunks: int = 3,
    recolored: bool = False,
    cut_prefix: str = "",
) -> ViewSource:
    pool = small_pool(recolored=recolored)
    tokens = tokenize_captions(
        pool.scenes, encoder, phrasings=2, omit=0.0, device=CPU, distinct=pool.count, cut_prefix=cut_prefix
    )
    return ViewSource(
        small_bank(bank, pool),
        tokens,
        [ViewStage(batch=batch, chunks=chunks)],
        config,
        FlowSchedule(5.0),
        seed=3,
        tokens_per_chunk=SPEC.tokens_per_chunk,
    )


def small_objective(encoder: TextEncoder, context: ContextLevel = CLEAN_CONTEXT) -> TeacherForcing:
    config = TransformerConfig(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=128,
        ffn_dim=32,
        num_layers=2,
        text_len=TEXT_LEN,
    )
    transformer = CausalTransformer(config)
    transformer.initialize(torch.Generator().manual_seed(0))
    return TeacherForcing(
        transformer,
        encoder,
        TeacherForcingConfig(),
        spec=SPEC,
        schedule=FlowSchedule(5.0),
        device=CPU,
        context=context,
    )


def test_bank_of_a_resumed_run_equals_that_of_an_uninterrupted_one() -> None:
    whole, resumed = small_bank(), small_bank()
    whole.start(0)
    assert whole.filled == 4
    for step in range(1, 20):
        whole.advance(step)
    assert whole.filled == 8
    resumed.start(19)
    assert torch.equal(whole.latents, resumed.latents)
    assert torch.equal(whole.scene, resumed.scene)
    resumed.start(2)
    assert not torch.equal(whole.latents, resumed.latents)


def test_bank_streams_what_one_pass_encodes() -> None:
    bank = small_bank()
    plan = bank.plan(0)
    frames = 4 * SPEC.chunk_frames * BANK.chunks - 3
    chunk = torch.cat((torch.zeros(5), torch.arange(8, 8 * BANK.chunks) // 8)).long()
    seconds = plan.start_seconds[:, chunk] + torch.arange(frames) / 24
    video, _ = bank.pool.draw(plan.scene[:, chunk], seconds)
    with torch.no_grad():
        moments, _ = bank.autoencoder.encode(video)
    expected = bank.autoencoder.normalize(moments.chunk(2, 1)[0])
    torch.testing.assert_close(bank.encode(plan), expected, rtol=1e-4, atol=1e-4)


def test_cuts_fall_between_chunks_in_the_asked_share_of_clips() -> None:
    bank = small_bank(replace(BANK, clips=256, initial_clips=256, group=256))
    scene = bank.plan(0).scene
    cuts = (scene[:, 1:] != scene[:, :-1]).sum(1)
    assert 0.22 < (cuts > 0).float().mean() < 0.45
    assert cuts.max() == 2


def test_views_say_what_they_hold(encoder: TextEncoder) -> None:
    source = view_source(encoder, ViewConfig(start_fraction=0.5, image_fraction=0.5, phrasings=2), batch=64)
    source.start(0)
    batch = source.batch(0)
    bank = source.bank
    opening = (batch.loss_mask[:, 1] == 1).nonzero().flatten()
    later = (batch.loss_mask[:, 1] == 0).nonzero().flatten()
    assert 16 < len(opening) < 48
    assert (batch.loss_mask[later, 2:] == 1).all() and (batch.loss_mask[later, :2] == 0).all()
    given_rows = opening[batch.loss_mask[opening, 0] == 0]
    assert len(given_rows) > 4 and (batch.sigma[given_rows, 0] == 0).all() and (batch.sigma[given_rows, 1] > 0).all()
    firsts = bank.latents[: bank.filled, :, :6].float()
    for row in opening:
        assert (firsts == batch.clean[row]).flatten(1).all(1).any()
    for row in later:
        assert (bank.latents[: bank.filled, :, 2:].float() == batch.clean[row]).flatten(1).all(1).any()
    assert (batch.sigma[:, 2] == batch.sigma[:, 3]).all() and not (batch.sigma[:, 2] == batch.sigma[:, 4]).all()
    assert batch.context_sigma.max() <= 0.15
    assert 0.55 < (batch.context_sigma > 0).float().mean() < 0.85


def test_captions_belong_to_the_scene_of_each_chunk(encoder: TextEncoder) -> None:
    cutting = replace(BANK, cut_fraction=1.0)
    source = view_source(encoder, ViewConfig(prompt_dropout=0.25, start_fraction=1.0, phrasings=2), cutting, batch=32)
    source.start(0)
    batch = source.batch(1)
    tokens, bank = source.tokens, source.bank
    assert batch.ids is not None
    dropped = (batch.ids == tokens.empty_ids).all(-1)
    assert (dropped.any(1) == dropped.all(1)).all()
    assert 2 < int(dropped.all(1).sum()) < 16
    firsts = bank.latents[: bank.filled, :, :6].float()
    for row in (~dropped.all(1)).nonzero().flatten():
        clips = (firsts == batch.clean[row]).flatten(1).all(1).nonzero().flatten()
        for chunk in range(3):
            known = tokens.ids[0, bank.scene[clips, chunk]].flatten(0, 1)
            assert (known == batch.ids[row, chunk]).all(-1).any()


def test_a_chunk_after_a_cut_is_captioned_with_the_words_that_announce_it(encoder: TextEncoder) -> None:
    cutting = replace(BANK, cut_fraction=0.5)
    config = ViewConfig(prompt_dropout=0.0, start_fraction=0.5, phrasings=2)
    source, plain = (
        view_source(encoder, config, cutting, batch=32, cut_prefix=prefix) for prefix in ("the background moves. ", "")
    )
    for views in (source, plain):
        views.start(0)
    announced, plain_batch, bank = source.batch(1), plain.batch(1), source.bank
    assert announced.ids is not None and plain_batch.ids is not None and torch.equal(announced.clean, plain_batch.clean)
    prefix_ids, prefix_mask = encoder.tokenize(["the background moves."])
    words = int(prefix_mask.sum()) - 1  # without the end token
    clips, frames = bank.latents[: bank.filled].float(), SPEC.chunk_frames
    seen = {False: 0, True: 0}
    for row in range(32):
        places = [
            (clip, first)
            for clip in range(bank.filled)
            for first in range(BANK.chunks - 2)
            if torch.equal(clips[clip, :, first * frames : (first + 3) * frames], announced.clean[row])
        ]
        clip, first = places[0]
        for chunk in range(3):
            cut = bool(bank.cut[clip, first + chunk])
            seen[cut] += 1
            length = int(plain_batch.mask[row, chunk].sum())  # type: ignore[index]
            expected = torch.cat((prefix_ids[0, : words * cut], plain_batch.ids[row, chunk, :length]))
            assert torch.equal(announced.ids[row, chunk, : len(expected)], expected)
            assert int(announced.mask[row, chunk].sum()) == len(expected)  # type: ignore[index]
    assert min(seen.values()) > 5
    assert not bank.cut[:, 0].any()


@torch.no_grad()
@pytest.mark.parametrize("clean_pass", [True, False])
def test_the_context_is_what_a_roll_out_keeps_of_finished_chunks(encoder: TextEncoder, clean_pass: bool) -> None:
    """Chunk by chunk through a cache, as generation goes, the velocities are those that the loss is taken of."""
    source = view_source(encoder, ViewConfig(context_noise_fraction=0.0, image_fraction=0.5, phrasings=2), batch=4)
    source.start(0)
    batch, solver = source.batch(3), UniPC(3, 5.0)
    objective = small_objective(encoder, context_level(solver, clean_pass=clean_pass))
    torch.nn.init.normal_(objective.transformer.head.head.weight, std=0.1, generator=seeded(torch.Generator(), 1))
    features = objective._features(batch.ids, batch.mask)
    schedule, is_generated = objective.schedule, (batch.sigma > 0).float()
    kept_sigma, model_sigma = (0.0, 0.0) if clean_pass else (solver.sigmas[2], solver.timesteps[2] / 1000)
    context = schedule.add_noise(batch.clean, batch.context_noise, kept_sigma * is_generated)
    noisy = schedule.add_noise(batch.clean, batch.noise, batch.sigma)
    denoiser = CachedTransformer(objective.transformer, SPEC, batch=4)
    velocities = []
    for index in range(3):
        frames = slice(index * SPEC.chunk_frames, (index + 1) * SPEC.chunk_frames)
        denoiser.begin(index, shot=0, text=objective.transformer.encode_text(features[:, index]))
        velocities.append(denoiser.velocity(noisy[:, :, frames], batch.sigma[:, frames]))
        denoiser.velocity(context[:, :, frames], model_sigma * is_generated[:, frames], keep=True)
        denoiser.commit()
    error = (torch.cat(velocities, dim=2) - schedule.velocity(batch.clean, batch.noise)).square().mean((1, 3, 4))
    expected = (schedule.loss_weight(batch.sigma) * error * batch.loss_mask).sum() / batch.mean_weight
    loss, _ = objective(batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert 0 < int((is_generated == 0).sum()) < 4


RECOLORING = replace(BANK, clips=32, initial_clips=32, group=32, cut_fraction=0.0, recolor_fraction=1.0)


def test_an_object_takes_another_color_once_while_its_scene_goes_on() -> None:
    pool = small_pool(recolored=True)
    plan = small_bank(replace(RECOLORING, cut_fraction=0.4, recolor_fraction=0.5), pool).plan(0)
    changed = plan.scene[:, 1:] != plan.scene[:, :-1]
    same_scene = plan.scene % pool.count == (plan.scene % pool.count)[:, :1]
    assert 4 < plan.recolored.sum() < 20
    assert (changed.sum(1) == 1)[plan.recolored].all() and same_scene[plan.recolored].all()
    assert (plan.start_seconds == plan.start_seconds[:, :1])[plan.recolored].all()
    assert (plan.scene < pool.count)[~plan.recolored].all()
    assert set(changed[plan.recolored].nonzero()[:, 1].tolist()) == {0, 1, 2}


def test_past_before_a_new_color_is_seen_under_its_caption_and_gets_no_loss(encoder: TextEncoder) -> None:
    views = ViewConfig(prompt_dropout=0.0, start_fraction=1.0, image_fraction=0.0, phrasings=2)
    source = view_source(encoder, views, RECOLORING, batch=48, recolored=True)
    source.start(0)
    batch, bank, tokens = source.batch(0), source.bank, source.tokens
    assert batch.ids is not None and (batch.ids == batch.ids[:, :1]).all()
    trained = batch.loss_mask.unflatten(1, (3, -1))
    assert (trained == trained[..., :1]).all()
    firsts = bank.latents[:, :, :6].float()
    masked = 0
    for row in range(48):
        (clip,) = (firsts == batch.clean[row]).flatten(1).all(1).nonzero()[:1].flatten()
        scene = bank.scene[clip, :3]
        assert (tokens.ids[0, scene[-1]] == batch.ids[row, 0]).all(-1).any()
        assert torch.equal(trained[row, :, 0] == 1, scene == scene[-1])
        masked += int((scene != scene[-1]).any())
    assert masked > 16


def test_a_wrong_color_is_only_in_captions_of_chunks_that_go_on(encoder: TextEncoder) -> None:
    views = ViewConfig(prompt_dropout=0.0, start_fraction=1.0, image_fraction=0.0, phrasings=2)
    cutting = replace(RECOLORING, cut_fraction=0.5, recolor_fraction=0.0)
    right = view_source(encoder, views, cutting, batch=64, recolored=True)
    wrong = view_source(encoder, replace(views, wrong_color=0.5), cutting, batch=64, recolored=True)
    for source in (right, wrong):
        source.start(0)
    as_it_is, other = right.batch(0), wrong.batch(0)
    for name in ("clean", "noise", "sigma", "loss_mask"):
        assert torch.equal(getattr(as_it_is, name), getattr(other, name))
    assert as_it_is.ids is not None and other.ids is not None
    words = (as_it_is.ids != other.ids).sum(-1)
    assert set(words.unique().tolist()) == {0, 1}
    goes_on = (as_it_is.ids[:, 1:] == as_it_is.ids[:, :-1]).all(-1)
    assert (words[:, 0] == 0).all() and (words[:, 1:][~goes_on] == 0).all() and not goes_on.all()
    assert 0.3 < words[:, 1:][goes_on].float().mean() < 0.7


def test_captions_are_tokenised_as_prompts_are(encoder: TextEncoder) -> None:
    scenes = small_pool().scenes
    table = tokenize_captions(scenes, encoder, phrasings=2, omit=0.0, device=CPU)
    ids, mask = encoder.tokenize([caption(scene, 2 * i + p) for i, scene in enumerate(scenes) for p in range(2)])
    assert torch.equal(table.ids[0].flatten(0, 1), ids) and torch.equal(table.mask[0].flatten(0, 1), mask)
    empty_ids, empty_mask = encoder.tokenize([""])
    count = empty_ids.shape[1]
    assert torch.equal(table.empty_ids[:count], empty_ids[0]) and int(table.empty_mask.sum()) == int(empty_mask.sum())


def test_masked_loss_equals_a_direct_computation(encoder: TextEncoder) -> None:
    source = view_source(encoder, ViewConfig(phrasings=2), batch=5)
    source.start(0)
    batch = source.batch(7)
    objective = small_objective(encoder)
    with torch.no_grad():
        torch.nn.init.normal_(objective.transformer.head.head.weight, std=0.1, generator=seeded(torch.Generator(), 1))
        loss, metrics = objective(batch)
        context = batch.clean + batch.context_sigma[:, None, :, None, None] * (batch.context_noise - batch.clean)
        noisy = batch.clean + batch.sigma[:, None, :, None, None] * (batch.noise - batch.clean)
        features, plan = objective._features(batch.ids, batch.mask), objective.plan(3, None)
        total, count, plain = 0.0, 0, 0.0
        for row in range(5):
            one = slice(row, row + 1)
            inputs = (context, noisy, torch.zeros_like(batch.sigma), batch.sigma, features)
            seen, given_rows, seen_sigma, given_sigma, text = (x[one] for x in inputs)
            velocity = objective.velocity(seen, given_rows, seen_sigma, given_sigma, text, plan)
            for frame in range(6):
                if batch.loss_mask[row, frame] == 0:
                    continue
                target = batch.noise[row, :, frame] - batch.clean[row, :, frame]
                error = (velocity[0, :, frame] - target).square().mean()
                total += (objective.schedule.loss_weight(batch.sigma[row, frame]) * error).item()
                plain += error.item()
                count += 1
    assert 0 < count < 30
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert metrics["mse"].tolist() == pytest.approx([plain, count], rel=1e-5)
    buckets = torch.stack([value for name, value in metrics.items() if name.startswith("mse_")])
    assert buckets.sum(0).tolist() == pytest.approx([plain, count], rel=1e-5)


@torch.no_grad()
def test_velocity_equals_that_of_the_whole_masked_pass(encoder: TextEncoder) -> None:
    source = view_source(encoder, ViewConfig(phrasings=2), batch=2)
    source.start(0)
    batch, objective = source.batch(0), small_objective(encoder)
    torch.nn.init.normal_(objective.transformer.head.head.weight, std=0.1, generator=seeded(torch.Generator(), 1))
    layout = TokenLayout.teacher_forcing(SPEC, 3)
    text = objective.transformer.encode_text(objective._features(batch.ids, batch.mask).flatten(0, 1))
    target = objective.transformer(
        torch.cat((batch.context_noise, batch.noise), 2),
        torch.cat((torch.zeros_like(batch.sigma), batch.sigma), 1),
        text.select(torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])),
        rope=objective.transformer.rope(layout),
        attention=Masked(layout),
    )[:, :, 6:]
    features = objective._features(batch.ids, batch.mask)
    clean_sigma = torch.zeros_like(batch.sigma)
    got = objective.velocity(
        batch.context_noise, batch.noise, clean_sigma, batch.sigma, features, objective.plan(3, None)
    )
    torch.testing.assert_close(got, target, rtol=1e-4, atol=1e-5)


def test_views_of_one_chunk_open_their_video(encoder: TextEncoder) -> None:
    source = view_source(encoder, ViewConfig(image_fraction=0.0), replace(BANK, late_fraction=0.5), batch=16, chunks=1)
    source.start(0)
    batch, bank = source.batch(0), source.bank
    assert batch.clean.shape[2] == SPEC.chunk_frames and (batch.loss_mask == 1).all()
    openings = bank.latents[: bank.filled][~bank.late[: bank.filled], :, : SPEC.chunk_frames].float()
    assert 0 < len(openings) < bank.filled
    assert all((openings == row).flatten(1).all(1).any() for row in batch.clean)


def test_a_group_whose_rounded_share_is_late_keeps_an_opening_clip(encoder: TextEncoder) -> None:
    source = view_source(encoder, ViewConfig(), replace(BANK, late_fraction=0.9), batch=3, chunks=1)
    source.start(0)
    assert source.bank.num_late == 1
    assert (source.batch(0).loss_mask.sum(1) > 0).all()


def test_shots_begin_at_second_zero_unless_the_clip_is_late() -> None:
    bank = small_bank(replace(BANK, cut_fraction=0.5, late_fraction=0.5, clips=64, initial_clips=64, group=64))
    plan = bank.plan(0)
    frames_before = torch.tensor([0, 5, 13, 21])
    begins = plan.start_seconds + frames_before / 24
    cut = plan.scene[:, 1:] != plan.scene[:, :-1]
    assert cut.any() and torch.allclose(begins[:, 1:][cut], torch.zeros(int(cut.sum())), atol=1e-6)
    assert (begins[~plan.late, 0] == 0).all() and (begins[plan.late, 0] > 0).float().mean() > 0.9


def test_context_only_chunk_gets_no_loss_but_gives_gradient(encoder: TextEncoder) -> None:
    source = view_source(encoder, ViewConfig(start_fraction=0.0, phrasings=2), batch=4)
    source.start(0)
    batch = source.batch(0)
    objective = small_objective(encoder)
    torch.nn.init.normal_(objective.transformer.head.head.weight, std=0.1, generator=seeded(torch.Generator(), 1))
    noise = batch.noise.clone().requires_grad_()
    context_noise = batch.context_noise.clone().requires_grad_()
    context_sigma = batch.context_sigma + 0.1
    loss, _ = objective(replace(batch, noise=noise, context_noise=context_noise, context_sigma=context_sigma))
    loss.backward()
    assert noise.grad is not None and context_noise.grad is not None
    assert (noise.grad[:, :, :2] == 0).all() and (noise.grad[:, :, 2:] != 0).any()
    assert (context_noise.grad[:, :, :2] != 0).any() and (context_noise.grad[:, :, 4:] == 0).all()


def test_loss_falls_in_thirty_steps(encoder: TextEncoder) -> None:
    source = view_source(encoder, ViewConfig(phrasings=2), batch=8)
    source.start(0)
    objective = small_objective(encoder)
    engine = LocalEngine(objective, OptimizerConfig(), precision="fp32", device=CPU)
    before = {name: value.detach().clone() for name, value in engine.named.items()}
    batch, losses = source.batch(0), []
    for _ in range(30):
        loss, _ = engine.loss(batch)
        loss.backward()
        engine.step(1e-2, engine.clip())
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    moved = {name for name, value in engine.named.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("text_encoder.") for name in moved)


def test_impossible_banks_are_refused() -> None:
    with pytest.raises(ConfigError, match="recolor_fraction is 1.5; expected a number from 0 to 1"):
        BankConfig(recolor_fraction=1.5)
    with pytest.raises(ConfigError, match="bank.chunks is 1; expected at least 2"):
        BankConfig(recolor_fraction=0.5, chunks=1)
    with pytest.raises(ConfigError, match="wrong_color is -1; expected a number from 0 to 1"):
        ViewConfig(wrong_color=-1)
    with pytest.raises(ConfigError, match="bank.clips is 9; expected a multiple of bank.group=2"):
        BankConfig(clips=9, initial_clips=4, group=2)
    with pytest.raises(ConfigError, match="bank.initial_clips is 8; expected at most 4"):
        BankConfig(clips=4, initial_clips=8, group=2)


def test_nothing_is_compiled_where_weights_are_sharded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = TeacherForcingConfig()
    assert runnable(config, ParallelConfig(zero_stage=3)) is config
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert runnable(config, ParallelConfig(zero_stage=2)) is config
    assert not runnable(config, ParallelConfig(zero_stage=3)).compile
    assert caplog.messages == ["objective.compile is off because parallel.zero_stage=3 shards the weights"]
