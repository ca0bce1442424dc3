"""A 4-bit student learns the velocities of its teacher, on its own roll-outs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from longvideo.distill.qad import ChunkSource, ComparedChunk, QadConfig, QadObjective
from longvideo.distill.roles import Role
from longvideo.distill.walk import VideoRequest
from longvideo.model.cache import ChunkCache, KVCache, NVFP4KVCache
from longvideo.model.conditioning import Conditioning
from longvideo.quantization.convert import with_precision
from longvideo.rollout import CachedTransformer, rollout
from longvideo.training.engine import LocalEngine
from longvideo.training.optimizer import OptimizerConfig
from tests.distill import quantized, videos
from tests.golden import relative_error
from tests.model import small
from tests.training.toy import CPU

CUTS = (True, False, True, False, False)


def parts(objective: QadObjective, clip: VideoRequest) -> list[ComparedChunk]:
    branches = objective.rollouts.branches
    return [ComparedChunk(clip, index, negative) for negative in branches for index in range(clip.num_chunks)]


def losses(objective: QadObjective, clip: VideoRequest) -> Tensor:
    """Return the loss of each part, and add up gradients."""
    objective.begin(0)
    values = []
    for part in parts(objective, clip):
        loss, _ = objective(part)
        loss.backward()  # before the next part changes the cache, from which blocks are recomputed
        values.append(loss.detach())
    return torch.stack(values)


@pytest.mark.parametrize("levels", ["solver", "schedule"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("clean_pass", [True, False])
def test_a_student_that_is_not_rounded_has_no_loss(levels: Any, guidance: float, clean_pass: bool) -> None:
    """Through the window, shots and both branches. A rounded one has a loss on every chunk."""
    clip = videos.clip(CUTS)
    # one text for each sample: texts that are encoded with gradients are then those encoded without
    clip = replace(clip, features_PJD=small.features(2), prompt_NB=torch.arange(2).expand(len(CUTS), 2))
    unrounded, rounded = (
        quantized.objective(
            quantized.networks(train), QadConfig(levels=levels), guidance=guidance, clean_pass=clean_pass
        )
        for train in ("nothing rounded", "weights")
    )
    assert held_out_loss(unrounded, clip) == 0
    values = losses(unrounded, clip)
    assert len(values) == (5 if guidance == 1 else 10)
    assert values.max() < 1e-10  # with gradients the keys have another order, and so have sums over them
    assert losses(rounded, clip).min() > 1e-6


@pytest.mark.parametrize("train", ["weights", "lora"])
def test_the_teacher_gets_no_gradient_and_all_trained_weights_do(train: Literal["weights", "lora"]) -> None:
    own = quantized.networks(train, cache_type=NVFP4KVCache)
    if train == "lora":  # an adapter starts without an effect, and then only its second factor has a gradient
        for name, weight in own.trained(Role.STUDENT).items():
            weight.data.normal_(std=0.1) if name.endswith("lora_B") else None
    objective = quantized.objective(own, guidance=2.0)
    losses(objective, videos.clip(CUTS))
    trained = own.trained(Role.STUDENT)
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in trained.values())
    assert len(list(objective.parameters())) == len(trained)
    own_ids = {id(weight) for weight in trained.values()}
    for role in (Role.STUDENT, Role.TEACHER):
        frozen = [weight for weight in own.switch(role).parameters() if id(weight) not in own_ids]
        assert frozen and all(weight.grad is None and not weight.requires_grad for weight in frozen)


@pytest.mark.parametrize("cache_type", [KVCache, NVFP4KVCache])
@pytest.mark.parametrize("clean_pass", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_roll_out_is_what_the_packed_model_generates(
    cache_type: type[ChunkCache], clean_pass: bool, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = quantized.networks(cache_type=cache_type)
    rollouts = quantized.objective(own, guidance=guidance, clean_pass=clean_pass).rollouts
    clip = videos.clip(CUTS)
    packed = with_precision(quantized.plain_model(), "nvfp4")
    with torch.no_grad():
        text = packed.encode_text(clip.features_PJD)
    negative = torch.full_like(clip.prompt_NB[0], len(clip.features_PJD) - 1)
    chunks = [
        Conditioning(text=text, prompt_index=rows, negative_index=negative, cut=cut)
        for rows, cut in zip(clip.prompt_NB, clip.cuts, strict=True)
    ]
    noises = iter([rollouts.noise(clip, index, "student") for index in range(clip.num_chunks)])
    monkeypatch.setattr("longvideo.rollout._noise", lambda *_: next(noises))
    copies = 1 if guidance == 1 else 2
    generated = rollout(
        CachedTransformer(packed, videos.SPEC, batch=copies * clip.batch, cache_type=cache_type),
        chunks,
        solver=rollouts.solver,
        generators=[torch.Generator() for _ in clip.samples],
        guidance=guidance,
        clean_pass=clean_pass,
    )
    for got, latents in zip(rollouts.roll_out(clip, "student").latents, generated, strict=True):
        # both branches share one scale of inputs in generation, and have one each here
        assert relative_error(got, latents) < (1e-5 if guidance == 1 else 0.2)


def test_compared_latents_are_inputs_of_solver_steps_or_noisy_results() -> None:
    clip = videos.clip(CUTS, first_latent=small.latents(1, spec=videos.SPEC, batch=2)[:, :, :1])
    own = quantized.networks()
    solver = quantized.objective(own)
    compared = solver._roll_out(clip)
    assert len(set(compared.rollout.exits)) > 1
    for index, step in enumerate(compared.rollout.exits):
        assert torch.equal(compared.sigmas[index], solver.rollouts.model_sigma(clip, index, step))
        assert torch.equal(compared.inputs[index], compared.rollout.inputs[index])
    noisy = quantized.objective(own, QadConfig(levels="schedule"))
    compared = noisy._roll_out(clip)
    drawn = torch.cat([sigma[:, -1] for sigma in compared.sigmas])
    assert drawn.unique().numel() == drawn.numel() and ((drawn > 0) & (drawn <= 1)).all()
    assert not compared.sigmas[0][:, 0].any()
    for index, latents in enumerate(compared.rollout.latents):
        noise = noisy.rollouts.noise(clip, index, "compared")
        expected = noisy.schedule.add_noise(latents, noise, compared.sigmas[index])
        assert torch.equal(compared.inputs[index], expected)


def test_weighted_losses_have_the_weight_of_training() -> None:
    own, clip = quantized.networks(), videos.clip(CUTS)
    plain, weighted = (
        quantized.objective(own, QadConfig(levels="schedule", weighting=weighting))
        for weighting in ("none", "training")
    )
    compared = plain._roll_out(clip)
    for one, other, sigma in zip(losses(plain, clip), losses(weighted, clip), compared.sigmas, strict=True):
        weights = plain.schedule.loss_weight(sigma)
        assert weights.min() * one <= other * 1.0001 and other <= weights.max() * one * 1.0001


def test_memory_of_a_clip_is_released_and_checkpoints_change_nothing() -> None:
    clip = videos.clip(CUTS)
    gradients: list[Tensor] = []
    for checkpoint in (False, True):
        own = quantized.networks()
        objective = quantized.objective(own, QadConfig(checkpoint=checkpoint))
        losses(objective, clip)
        assert objective._comparison is not None and objective._comparison.walk is None
        gradients.append(
            torch.cat([weight.grad.flatten() for weight in objective.parameters() if weight.grad is not None])
        )
    assert torch.equal(*gradients)


@torch.no_grad()
def held_out_loss(objective: QadObjective, clip: VideoRequest) -> float:
    objective.begin(0)
    return sum(float(objective(part)[0]) for part in parts(objective, clip)) / clip.num_chunks


def engine_of(objective: QadObjective, rate: float) -> LocalEngine:
    optimizer = OptimizerConfig(learning_rate=rate, warmup_steps=0, beta1=0.9, beta2=0.99)
    return LocalEngine(objective, optimizer, precision="fp32", device=CPU, ema_decay=0.5)


@pytest.mark.parametrize(("train", "rate"), [("weights", 3e-4), ("lora", 1e-3)])
def test_the_loss_falls(train: Literal["weights", "lora"], rate: float) -> None:
    """In 30 steps, on clips that are not those of the training."""
    own = quantized.networks(train)
    objective = quantized.objective(own)
    engine = engine_of(objective, rate)
    held_out = replace(videos.clip(), step=1000)
    before = held_out_loss(objective, held_out)
    for step in range(30):
        clip = replace(videos.clip(), step=step)
        engine.train_step(parts(objective, clip), step, rate)
    after = held_out_loss(objective, held_out)
    assert after < 0.75 * before


def test_a_source_yields_all_chunks_of_a_branch_in_order() -> None:
    class Clips:
        def shares(self, *_: Any) -> list[VideoRequest]:
            return [videos.clip(), videos.clip()]

        def passes(self, *_: Any) -> int:
            return 2 * 3

    source = ChunkSource(Clips(), (False, True))  # type: ignore[arg-type]
    order = [(share.negative, share.index) for share in source.shares(0, None, None)]  # type: ignore[arg-type]
    one = [(False, 0), (False, 1), (False, 2), (True, 0), (True, 1), (True, 2)]
    assert order == one * 2 and source.passes(None, None) == len(order)  # type: ignore[arg-type]
