"""The student's rollout is generation; its gradient stays in one chunk and in one adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longvideo.distill.objectives import CriticObjective, DmdConfig, NoisyCopies, StudentObjective
from longvideo.distill.roles import LoraRoles, Role
from longvideo.distill.self_forcing import CacheFill, RolloutConfig, SelfForcing
from longvideo.distill.walk import VideoRequest
from longvideo.flow.unipc import UniPC
from longvideo.kernels.backends import TransformerPrecision
from longvideo.model.cache import ChunkCache, NVFP4KVCache, NVFP4MixedKVCache
from longvideo.model.conditioning import Conditioning
from longvideo.quantization.convert import with_precision
from longvideo.rollout import CachedTransformer, context_level, rollout
from tests.distill import videos
from tests.golden import relative_error
from tests.model import small
from tests.quantization import small as packable

CUTS = (True, False, True, False, False)


def generated(
    roles: LoraRoles, rollouts: SelfForcing, clip: VideoRequest, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Return what inference makes of the same noise."""
    student = roles.switch(Role.STUDENT)
    with torch.no_grad():
        text = student.encode_text(clip.features_PJD)
    chunks = [
        Conditioning(text=text, prompt_index=rows, cut=cut, first_latent=None if index else clip.first_latent)
        for index, (rows, cut) in enumerate(zip(clip.prompt_NB, clip.cuts, strict=True))
    ]
    noises = iter([rollouts.noise(clip, index, "student") for index in range(clip.num_chunks)])
    monkeypatch.setattr("longvideo.rollout._noise", lambda *_: next(noises))
    type(roles.new_cache(Role.STUDENT, 1))
    generated = rollout(
        CachedTransformer(
            student, videos.SPEC, batch=len(clip.samples), cache_type=type(roles.new_cache(Role.STUDENT, 1))
        ),
        chunks,
        solver=rollouts.solver,
        generators=[torch.Generator() for _ in clip.samples],
        clean_pass=rollouts.clean_pass,
    )
    return [latents.clone() for latents in generated]


@pytest.mark.parametrize("cache_fill", ["clean", "last_step"])
@pytest.mark.parametrize("image", [False, True])
def test_a_roll_out_to_the_last_step_is_what_generation_makes(
    cache_fill: CacheFill, image: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a window that rolls, shots that are pinned and moved apart, prompts of their own, and a given image."""
    roles = videos.roles(small.model(), stirred=0.2)
    rollouts, _ = videos.parts(roles, RolloutConfig(steps=3, exits="last", cache_fill=cache_fill))
    first = small.latents(1, spec=videos.SPEC, batch=2)[:, :, :1] if image else None
    clip = videos.clip(CUTS, first_latent=first)
    rollout = rollouts.roll_out(clip, "student").latents
    expected = generated(roles, rollouts, clip, monkeypatch)
    for got, want in zip(rollout, expected, strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize(
    ("precision", "cache_type"), [("bf16", NVFP4KVCache), ("nvfp4", NVFP4KVCache), ("bf16", NVFP4MixedKVCache)]
)
def test_a_cache_in_four_bits_is_that_of_generation(
    precision: TransformerPrecision, cache_type: type[ChunkCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "SPEC", replace(videos.SPEC, window_frames=8))
    roles = videos.roles(with_precision(packable.model(), precision), stirred=0.2, cache_type=cache_type)
    rollouts, copies = videos.parts(roles, RolloutConfig(steps=2, exits="last"))
    clip = videos.clip(CUTS)
    expected = generated(roles, rollouts, clip, monkeypatch)
    for got, want in zip(rollouts.roll_out(clip, "student").latents, expected, strict=True):
        assert relative_error(got, want) < 1e-5
    objective = StudentObjective(rollouts, copies)
    for part in objective.parts([clip]):
        loss, _ = objective(part)
        loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in objective.parameters())


def test_offset_and_adapter_reach_the_chunks_after_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = {}
    for offset, stirred in ((4, 0.2), (0, 0.2), (4, 0.0)):
        monkeypatch.setattr(videos, "SPEC", replace(videos.SPEC, offset_per_shot=offset))
        rollouts, _ = videos.parts(videos.roles(small.model(), stirred=stirred))
        rollout[offset, stirred] = rollouts.roll_out(videos.clip(CUTS), "student").latents
        monkeypatch.undo()
    for index, before_cut in enumerate((True, True, False, False, False)):
        moved = relative_error(rollout[0, 0.2][index], rollout[4, 0.2][index])
        assert moved == 0 if before_cut else moved > 1e-3
        assert relative_error(rollout[4, 0.0][index], rollout[4, 0.2][index]) > 1e-2


def test_exits_are_drawn_once_or_for_each_chunk() -> None:
    roles = videos.roles(small.model())
    drawn = {}
    for exits in ("shared", "chunk", "last"):
        rollouts, _ = videos.parts(roles, RolloutConfig(steps=3, exits=exits))
        clips = [replace(videos.clip(), step=step) for step in range(40)]
        drawn[exits] = [tuple(rollouts.exits(clip, "student")) for clip in clips]
        assert drawn[exits] == [tuple(rollouts.exits(clip, "student")) for clip in clips]
    assert {len(set(exits)) for exits in drawn["shared"]} == {1}
    assert {exits[0] for exits in drawn["shared"]} == {0, 1, 2}
    assert max(len(set(exits)) for exits in drawn["chunk"]) > 1
    assert set(drawn["last"]) == {(2, 2, 2)}


def test_noise_does_not_depend_on_how_a_batch_is_divided() -> None:
    rollouts, _ = videos.parts(videos.roles(small.model()))
    whole = rollouts.roll_out(videos.clip(CUTS), "student")
    clip = videos.clip(CUTS)
    for sample in range(2):
        alone = replace(clip, samples=(sample,), prompt_NB=clip.prompt_NB[:, sample : sample + 1])
        rollout = rollouts.roll_out(alone, "student")
        for got, want in zip(rollout.latents, whole.latents, strict=True):
            assert relative_error(got, want[sample : sample + 1]) < 1e-5


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("cache_fill", ["clean", "last_step"])
def test_the_gradient_is_that_of_the_live_chunk_alone(cache_fill: CacheFill, checkpoint: bool) -> None:
    """Against finite differences of the loss of one chunk, its context held as it was: whatever flowed through cached
    keys and values would be too much."""
    roles = videos.roles(small.model().double(), stirred=0.2)
    for role in (Role.STUDENT, Role.CRITIC):
        for weight in roles.trained(role).values():
            weight.data = weight.data.double()
    config = RolloutConfig(steps=3, cache_fill=cache_fill)
    rollouts, copies = videos.parts(roles, config, DmdConfig(checkpoint=checkpoint))
    objective = StudentObjective(rollouts, copies)
    parts = objective.parts([videos.clip(CUTS)])
    weights = roles.trained(Role.STUDENT)
    roles.switch(Role.STUDENT)
    generator = torch.Generator().manual_seed(3)
    for index, part in enumerate(parts[:-1]):  # the walk that is looked into ends with the last
        loss, _ = objective(part)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        ways = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights.values()]
        along = sum((g * way).sum() for g, way in zip(gradients, ways, strict=True))
        # the target of the loss moves with x0, so what is measured is x0 against the gradient it was given
        measured = []
        for step in (1e-3, -1e-3):
            for weight, way in zip(weights.values(), ways, strict=True):
                weight.data += step * way
            x = part.rollout.inputs[index]
            last = part.rollout.exits[index]
            assert objective._walk is not None and objective._walk.index == index
            with torch.no_grad():
                objective._walk._text = objective._walk.network.encode_text(part.clip.features_PJD)
                velocity = objective._walk.velocity(x, rollouts.model_sigma(part.clip, index, last))
            x0 = rollouts.result(part.clip, index, x, velocity, last)
            measured.append((x0 * part.gradients[index]).mean())
            for weight, way in zip(weights.values(), ways, strict=True):
                weight.data -= step * way
        with torch.no_grad():
            objective._walk._text = objective._walk.network.encode_text(part.clip.features_PJD)
        difference = (measured[0] - measured[1]) / 2e-3
        assert abs(along - difference) < 2e-3 * abs(difference) + 1e-6, (index, along, difference)


@pytest.mark.parametrize("precision", ["bf16", "nvfp4"])
@pytest.mark.parametrize("shared", [True, False])
def test_no_gradient_reaches_the_backbone_or_the_other_adapter(precision: TransformerPrecision, shared: bool) -> None:
    student = with_precision(packable.model(), precision)
    teacher = None if shared else with_precision(packable.model(seed=1), precision)
    roles = videos.roles(student, teacher, stirred=0.1)
    rollouts, copies = videos.parts(roles)
    for own, other, objective in (
        (Role.STUDENT, Role.CRITIC, StudentObjective(rollouts, copies)),
        (Role.CRITIC, Role.STUDENT, CriticObjective(rollouts, copies)),
    ):
        for part in objective.parts([videos.clip()]):
            loss, _ = objective(part)
            loss.backward()
        # keys and values of the last block's text, and everything before the head, take part
        assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in roles.trained(own).values())
        assert all(weight.grad is None for weight in roles.trained(other).values())
        frozen = [
            p
            for model in (student, teacher)
            if model is not None
            for n, p in model.named_parameters()
            if "lora_" not in n
        ]
        assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
        assert {name.replace("/", ".") for name, _ in objective.named_parameters()} == set(roles.trained(own))
        for weight in roles.trained(own).values():
            weight.grad = None


def test_the_teacher_is_the_backbone_and_adapters_differ() -> None:
    model = small.model()
    plain_roles = videos.roles(small.model())
    plain, plain_looks = videos.parts(plain_roles)
    roles = videos.roles(model, stirred=0.2)
    rollouts, copies = videos.parts(roles)
    clip = videos.clip()
    rollout = plain.roll_out(clip, "student")
    noises, sigmas = copies.draw(clip, "student")
    noisy = [copies.schedule.add_noise(x, e, s) for x, e, s in zip(rollout.latents, noises, sigmas, strict=True)]
    estimates = {role: torch.cat(copies._estimates(role, clip, rollout, noisy, sigmas), 2) for role in Role}
    untouched = torch.cat(plain_looks._estimates(Role.STUDENT, clip, rollout, noisy, sigmas), 2)
    assert torch.equal(estimates[Role.TEACHER], untouched)
    assert relative_error(estimates[Role.STUDENT], untouched) > 1e-2
    assert relative_error(estimates[Role.CRITIC], estimates[Role.STUDENT]) > 1e-2


def test_given_frames_get_no_gradient() -> None:
    roles = videos.roles(small.model(), stirred=0.2)
    rollouts, copies = videos.parts(roles)
    first = small.latents(1, spec=videos.SPEC, batch=2)[:, :, :1]
    clip = videos.clip(first_latent=first)
    (part, *_) = StudentObjective(rollouts, copies).parts([clip])
    assert torch.equal(part.rollout.latents[0][:, :, :1], first)
    assert not part.gradients[0][:, :, 0].any() and part.gradients[0][:, :, 1].any()


def test_a_student_like_its_teacher_is_left_alone() -> None:
    """Where critic and teacher are equal there is no gradient, and the denominator is not zero."""
    roles = videos.roles(small.model())
    _, copies = videos.parts(roles, dmd=DmdConfig(guidance=1.0))
    rollouts = copies.rollouts
    for part in StudentObjective(rollouts, copies).parts([videos.clip()]):
        assert not part.gradients[part.index].any()


@pytest.mark.parametrize("image", [False, True])
def test_teacher_and_critic_see_earlier_chunks_at_the_level_at_which_their_backbone_keeps_them(image: bool) -> None:
    roles = videos.roles(small.model(), stirred=0.2)
    rollouts, clean = videos.parts(roles)
    level = context_level(UniPC(4, 3.0), clean_pass=False)
    copies = NoisyCopies(rollouts, clean.config, guidance=2.0, shift=3.0, seed=0, context=level)
    first = small.latents(1, spec=videos.SPEC, batch=2)[:, :, :1] if image else None
    clip = videos.clip(CUTS, first_latent=first)
    rollout = rollouts.roll_out(clip, "student")
    for index in range(clip.num_chunks):
        kept, model_sigma = copies.to_keep(clip, rollout, index)
        weight = clip.weight(index, videos.SPEC.chunk_frames)
        assert torch.equal(model_sigma, weight * UniPC(4, 3.0).timesteps[3] / 1000)
        noise = (kept - rollout.latents[index]) / level.sigma + rollout.latents[index]
        is_made = weight[:, None, :, None, None] > 0
        assert torch.where(is_made, 0, kept - rollout.latents[index]).abs().max() == 0
        assert 0.7 < float(noise.masked_select(is_made).std()) < 1.3
        unchanged, zero = clean.to_keep(clip, rollout, index)
        assert torch.equal(unchanged, rollout.latents[index]) and not zero.any()
    gradients = [copies.gradients(clip, rollout), clean.gradients(clip, rollout)]
    assert torch.equal(gradients[0][0], gradients[1][0]), "the first chunk sees no other"
    assert all(relative_error(*pair) > 1e-3 for pair in zip(gradients[0][1:], gradients[1][1:], strict=True))
