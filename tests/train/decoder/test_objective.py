"""Windows of the bank's clips, and the objective of the small decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from longvideo.distributed import Mesh
from longvideo.errors import ConfigError
from longvideo.train.decoder.distillation import DecoderDistillation, DistillationConfig
from longvideo.train.decoder.pairs import PairBank, PairConfig, WorldFootage, decode_clips
from longvideo.train.decoder.report import color_outlines
from longvideo.train.decoder.windows import WindowBatch, WindowConfig, WindowSource, WindowStage
from longvideo.train.shapeworld.latent_bank import BankConfig, LatentBank
from longvideo.training.engine import LocalEngine
from longvideo.training.optimizer import OptimizerConfig
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder
from tests.train.small import CPU, small_autoencoder, small_pool

SMALL = PairConfig(clips=4, initial_clips=4, group=2, refresh_every=2, chunks=2)


def pair_bank(config: PairConfig = SMALL) -> PairBank:
    teacher = small_autoencoder().requires_grad_(False)
    sizes = BankConfig(clips=2, initial_clips=2, group=2, chunks=config.chunks)
    footage = LatentBank(teacher, small_pool(), sizes, chunk_frames=4, seed=0, precision="fp32")
    return PairBank(WorldFootage(footage), teacher, config, seed=0, precision="fp32")


@pytest.fixture(scope="module")
def source() -> WindowSource:
    source = WindowSource(pair_bank(), [WindowStage(steps=4, batch=4, frames=3)], WindowConfig(0.5, 2), seed=0)
    source.start(0)
    return source


@pytest.fixture
def student() -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(TinyAutoencoderConfig("base", z_dim=4, decoder_widths=(8, 8, 6, 4)))


def objective(student: TinyDecoder, config: DistillationConfig | None = None) -> DecoderDistillation:
    return DecoderDistillation(student, config or DistillationConfig(), device=CPU, compiled=False)


def test_pixels_are_those_of_the_full_decoder(source: WindowSource) -> None:
    bank = source.bank
    expected = decode_clips(bank.teacher, bank.latents.transpose(1, 2).float(), precision="fp32")
    assert bank.latents.shape == (4, 8, 4, 2, 4) and bank.pixels.shape == (4, 32, 32, 64, 3)
    torch.testing.assert_close(bank.pixels[:, 3:].permute(0, 4, 1, 2, 3).float(), expected, atol=1e-3, rtol=0)
    assert not bank.pixels[:, :3].any() and bank.opening.all()


def test_noise_changes_the_latents_and_the_pixels_of_them() -> None:
    clean, noisy = (
        pair_bank(replace(SMALL, noise=0.0)),
        pair_bank(replace(SMALL, noise=0.5)),
    )
    for bank in (clean, noisy):
        bank.start(0)
    deviation = (noisy.latents - clean.latents).float().flatten(1).std(1)
    assert (deviation > 0).all() and (deviation < 0.55).all() and deviation.max() > 1.2 * deviation.min()
    expected = decode_clips(noisy.teacher, noisy.latents.transpose(1, 2).float(), precision="fp32")
    torch.testing.assert_close(noisy.pixels[:, 3:].permute(0, 4, 1, 2, 3).float(), expected, atol=1e-3, rtol=0)


def test_windows_have_the_frames_before_them_and_their_own_pixels(source: WindowSource) -> None:
    batch, bank = source.batch(1), source.bank
    assert batch.opening.any() and not batch.opening.all()
    for window in range(4):
        places = [
            (clip, first)
            for clip in range(4)
            for first in range(6)
            if torch.equal(bank.latents[clip, first : first + 3].transpose(0, 1).float(), batch.latents[window])
        ]
        ((clip, first),) = places
        assert torch.equal(
            bank.pixels[clip, 4 * first : 4 * first + 12].permute(3, 0, 1, 2).float(), batch.pixels[window]
        )
        if batch.opening[window]:
            assert first == 0 and batch.weight[window].tolist() == [0] * 3 + [1] * 9
        else:
            assert torch.equal(bank.latents[clip, first - 2 : first].transpose(0, 1).float(), batch.past[window])
            assert batch.weight[window].tolist() == [1] * 12


def test_a_batch_is_a_function_of_the_step(source: WindowSource) -> None:
    later = source.batch(3)
    other = WindowSource(pair_bank(), source.stages, source.config, seed=0)
    other.start(3)
    again = other.batch(3)
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(later).items())


def test_windows_decode_as_the_stream_does(source: WindowSource, student: TinyDecoder) -> None:
    latents = source.bank.latents[:1].transpose(1, 2).float()
    whole, _ = student.decode(latents)
    inside = objective(student).decode(latents[:, :, :5], latents[:, :, 5:], torch.tensor([False]))
    torch.testing.assert_close(inside, whole[:, :, -12:])
    opening = objective(student).decode(latents[:, :, 3:6], latents[:, :, :3], torch.tensor([True]))
    torch.testing.assert_close(opening[:, :, 3:], whole[:, :, :9])


def test_loss_equals_its_definition(source: WindowSource, student: TinyDecoder) -> None:
    batch = source.batch(0)
    video = torch.rand(batch.pixels.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = DistillationConfig(l1=0.5, l2=0.2, edge=0.7, temporal=0.3, outlines=3.0)
    loss, metrics = objective(student, config).compare(video, batch.pixels, batch.weight, batch.mean_weight)
    frames = batch.weight[:, None, :, None, None]
    weight = (1 + 3 * color_outlines(batch.pixels)) * frames
    error, count = video - batch.pixels, batch.weight.sum()
    rows, columns = error[..., 1:, :] - error[..., :-1, :], error[..., 1:] - error[..., :-1]
    changes = (error[:, :, 1:] - error[:, :, :-1]).abs() * weight[:, :, 1:] * frames[:, :, :-1]
    expected = (
        0.5 * (error.abs() * weight).sum() / (count * 3 * 32 * 64)
        + 0.2 * (error.square() * weight).sum() / (count * 3 * 32 * 64)
        + 0.35 * (rows.abs() * weight[..., 1:, :]).sum() / (count * 3 * 31 * 64)
        + 0.35 * (columns.abs() * weight[..., 1:]).sum() / (count * 3 * 32 * 63)
        + 0.3 * changes.sum() / (count * 3 * 32 * 64)
    )
    torch.testing.assert_close(loss, expected)
    perfect, parts = objective(student).compare(batch.pixels, batch.pixels, batch.weight, batch.mean_weight)
    assert perfect == 0 and parts["psnr"][0] / parts["psnr"][1] == 100
    assert metrics.keys() == parts.keys() == {"psnr", "l1", "l2", "edge", "temporal"}


def test_shares_of_a_step_have_the_gradient_of_the_whole(source: WindowSource, student: TinyDecoder) -> None:
    def gradients(shares: list[WindowBatch]) -> Iterator[torch.Tensor]:
        student.zero_grad()
        for share in shares:
            (objective(student)(share)[0] / len(shares)).backward()
        return (p.grad.clone() for p in student.parameters() if p.grad is not None)

    whole = list(gradients(source.shares(0, Mesh(), None)))
    assert len(whole) == len(list(student.parameters()))
    for divided, expected in zip(gradients(source.shares(0, Mesh(), 1)), whole, strict=True):
        torch.testing.assert_close(divided, expected, rtol=1e-3, atol=1e-5)


def test_only_the_small_decoder_is_trained_and_its_loss_falls(source: WindowSource, student: TinyDecoder) -> None:
    trained = objective(student)
    engine = LocalEngine(trained, OptimizerConfig(), precision="fp32", device=CPU)
    before = [p.clone() for p in source.bank.teacher.parameters()]
    (batch, _) = source.shares(0, Mesh(), 2)
    losses = [engine.train_step([batch], step, 1e-2)["loss"][0].item() for step in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    assert len(engine.parameters) == len(list(student.parameters()))
    assert all(p.grad is None for p in source.bank.teacher.parameters())
    assert all(torch.equal(p, old) for p, old in zip(source.bank.teacher.parameters(), before, strict=True))


def test_windows_longer_than_a_clip_are_refused() -> None:
    with pytest.raises(ConfigError, match="frames=7; expected at most 6, the latent frames of a clip"):
        WindowSource(pair_bank(), [WindowStage(frames=7)], WindowConfig(warmup=2), seed=0)
