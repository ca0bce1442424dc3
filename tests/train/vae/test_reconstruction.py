"""Clips for the autoencoder, and its objective."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvideo.errors import ConfigError
from longvideo.train.shapeworld.scenes import SceneConfig
from longvideo.train.vae.clips import ClipStage, ReconstructionSource, crop_near_objects
from longvideo.train.vae.recipe import AutoencoderShape, VaeRecipe, VaeTraining, VaeValidationConfig
from longvideo.train.vae.reconstruction import (
    Reconstruction,
    ReconstructionConfig,
    clip_psnr,
    difference,
    pixel_weight,
    weighted_mean,
)
from longvideo.training.engine import LocalEngine
from longvideo.training.optimizer import OptimizerConfig
from tests.train.small import CPU, small_autoencoder, small_pool


def clip_source(*stages: ClipStage, cut_fraction: float = 0.0) -> ReconstructionSource:
    return ReconstructionSource(
        small_pool(), stages, seed=1, max_seconds=60.0, cut_fraction=cut_fraction, latent_channels=4
    )


def test_batches_follow_from_the_step_and_the_stage() -> None:
    source = clip_source(ClipStage(1, 32, 64, 3, 2), ClipStage(5, 16, 32, 2, 4))
    again = clip_source(ClipStage(1, 32, 64, 3, 2), ClipStage(5, 16, 32, 2, 4))
    source.batch(0)
    one, other = source.batch(3), again.batch(3)
    assert torch.equal(one.video, other.video) and torch.equal(one.noise, other.noise)
    assert one.video.shape == (2, 3, 5, 16, 32) and one.noise.shape == (2, 4, 2, 1, 2)
    assert source.batch(1).video.shape == (3, 3, 1, 32, 64)
    assert (source.size(0), source.size(5)) == (3, 10)


def test_cut_clips_jump_once_in_scene_and_time() -> None:
    source = clip_source(ClipStage(17, 32, 64, 8, 1), cut_fraction=1.0)
    scene, seconds = source._draw(source.stages[0], torch.Generator().manual_seed(0))
    jumps = (seconds[:, 1:] - seconds[:, :-1] - 1 / 24).abs() > 1e-4
    assert (jumps.sum(1) == 1).all()
    changes = scene[:, 1:] != scene[:, :-1]
    assert changes.any() and not (changes & ~jumps).any()


def test_crops_hold_an_object() -> None:
    pool = small_pool(12, height=64, width=112)
    scene = torch.arange(12)[:, None]
    video, mask = pool.draw(scene, torch.zeros(12, 1))
    generator = torch.Generator().manual_seed(0)
    crop, crop_mask = crop_near_objects(video, mask, height=32, width=32, generator=generator)
    assert crop.shape == (12, 3, 1, 32, 32)
    assert (crop_mask.amax((1, 2, 3, 4)) > 0.5).all()
    for index in range(12):
        places = (video[index].unfold(2, 32, 1).unfold(3, 32, 1) - crop[index][:, :, None, None]).abs()
        assert places.amax((0, 1, 4, 5)).min() == 0


def test_weights_grow_around_objects() -> None:
    mask = torch.zeros(1, 1, 1, 9, 9)
    mask[..., 4, 4] = 1
    weight = pixel_weight(mask, foreground=4.0, margin=2)[0, 0, 0]
    assert weight[4, 4] == 5 and weight[2, 6] == 5 and weight[1, 4] == 1
    assert weight.sum() == 81 + 4 * 25


def test_loss_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    video, output = (torch.rand(2, 3, 5, 8, 8, generator=generator) for _ in range(2))
    mask = (torch.rand(2, 1, 5, 8, 8, generator=generator) > 0.7).float()
    mean, log_variance = (torch.randn(2, 4, 2, 1, 1, generator=generator) for _ in range(2))
    config = ReconstructionConfig(l1=0.5, l2=2.0, edge=0.7, temporal=0.3, foreground=3.0, margin=0, kl=0.01)
    objective = Reconstruction(small_autoencoder(), config, device=CPU)
    loss, metrics = objective.compare(output, video, mask, mean, log_variance)
    weight = 1 + 3 * mask
    error = output - video

    def average(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (values * weights).sum() / (3 * weights.sum())

    rows, columns = error[..., 1:, :] - error[..., :-1, :], error[..., 1:] - error[..., :-1]
    frames = error[:, :, 1:] - error[:, :, :-1]
    expected = (
        0.5 * average((error**2 + 1e-6).sqrt() - 1e-3, weight)
        + 2.0 * average(error**2, weight)
        + 0.35 * (average(rows.abs(), weight[..., 1:, :]) + average(columns.abs(), weight[..., 1:]))
        + 0.3 * average(frames.abs(), weight[:, :, 1:])
        + 0.01 * 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    )
    torch.testing.assert_close(loss, expected)
    squared = (output - video).square().mean((1, 2, 3, 4)) / 4
    torch.testing.assert_close(metrics["psnr"], (-10 * squared.log10()).mean())
    assert weighted_mean(torch.ones(2, 3, 5, 8, 8), weight) == 1
    assert difference(torch.arange(4.0).view(1, 1, 4, 1, 1), 2).flatten().tolist() == [1, 1, 1]


def test_object_psnr_looks_at_objects_alone() -> None:
    video = torch.zeros(1, 3, 1, 4, 4)
    mask = torch.zeros(1, 1, 1, 4, 4)
    mask[..., :1, :] = 1
    output = video + 0.2 * mask
    overall, objects = clip_psnr(output, video, mask)
    assert objects.item() == pytest.approx(20.0, abs=1e-4)
    assert overall.item() == pytest.approx(20.0 + 10 * torch.log10(torch.tensor(4.0)).item(), abs=1e-4)


def test_latent_statistics_are_those_of_as_many_clips_as_configured() -> None:
    validation = VaeValidationConfig(statistics_clips=3, batch=2)
    scenes = SceneConfig(count=4, height=32, width=64)
    model = AutoencoderShape(base_dim=8, decoder_base_dim=8, z_dim=4)
    config = VaeTraining(model=model, scenes=scenes, stages=[ClipStage(1, 32, 64)], validation=validation)
    recipe = VaeRecipe(config, CPU)
    measured, encode = [], recipe._encode

    def recorded(video: Tensor) -> list[Tensor]:
        measured.append(encode(video))
        return measured[-1]

    recipe._encode = recorded  # type: ignore[method-assign]
    mean, std = recipe._statistics()
    latents = torch.cat([torch.cat(chunks, dim=2).double().transpose(0, 1).flatten(1) for chunks in measured], dim=1)
    assert sum(len(chunks[0]) for chunks in measured) == 3
    assert mean == pytest.approx(latents.mean(1).tolist())
    assert std == pytest.approx(latents.std(1, correction=0).tolist())


def test_loss_falls_in_thirty_steps() -> None:
    source = clip_source(ClipStage(5, 32, 32, 4, 30))
    objective = Reconstruction(small_autoencoder(), ReconstructionConfig(), device=CPU)
    engine = LocalEngine(objective, OptimizerConfig(learning_rate=4e-3), precision="fp32", device=CPU)
    batch, losses = source.batch(0), []
    for _ in range(30):
        loss, _ = engine.loss(batch)
        loss.backward()
        engine.step(4e-3, engine.clip())
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_impossible_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="frames=6; expected 1 \\+ 4k, such as 5"):
        ClipStage(frames=6)
    with pytest.raises(ConfigError, match="height=40; expected a multiple of 16"):
        ClipStage(height=40)
    with pytest.raises(ConfigError, match="crops 48x64 from scenes of 32x64"):
        clip_source(ClipStage(1, 48, 64))
