"""The autoencoder against diffusers' AutoencoderKLWan, in one call and in several, and its checks."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from longvideo.errors import ConfigError, UserError
from longvideo.vae import Autoencoder, AutoencoderConfig, State

SMALL = replace(
    AutoencoderConfig.tiny(),
    base_dim=8,
    decoder_base_dim=12,
    z_dim=6,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    latents_mean=(0.1, -0.2, 0.3, 0.0, 0.5, -1.0),
    latents_std=(1.0, 0.5, 2.0, 1.5, 0.7, 0.1),
)
TOLERANCE = 1e-5


def diffusers_class() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    return AutoencoderKLWan


@cache
def reference() -> Any:
    torch.manual_seed(0)
    model = diffusers_class().from_config(SMALL.to_dict()).eval()
    # weights of one and small random biases would hide a missing norm or bias
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("gamma")), std=0.3)
    return model


@cache
def ours() -> Autoencoder:
    model = Autoencoder(SMALL)
    model.load_state_dict(reference().state_dict(), strict=True)
    return model.eval()


def video(num_latent_frames: int, seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, 4 * num_latent_frames - 3, 32, 48, generator=generator) * 2 - 1


def latents(num_frames: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, SMALL.z_dim, num_frames, 2, 3, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


def stream(code: Callable[[Tensor, State | None], tuple[Tensor, State]], pieces: list[Tensor]) -> Tensor:
    state, done = None, []
    for piece in pieces:
        out, state = code(piece, state)
        done.append(out)
    return torch.cat(done, dim=2)


def in_chunks(x: Tensor, chunk: int, rate: int) -> list[Tensor]:
    """Return pieces of `chunk` latent frames; the opening latent frame is one frame, later ones are `rate`."""
    total = 1 + (x.shape[2] - 1) // rate
    ends = [1 + rate * (end - 1) for end in range(chunk, total + chunk, chunk)]
    return list(x.tensor_split([end for end in ends if end < x.shape[2]], dim=2))


@torch.no_grad()
def wanted_moments(x: Tensor) -> Tensor:
    return reference().encode(x).latent_dist.parameters


@torch.no_grad()
def wanted_video(z: Tensor) -> Tensor:
    return reference().decode(z).sample


@pytest.mark.parametrize("num_latent_frames", [1, 2, 9])
@torch.no_grad()
def test_whole_clip_equals_diffusers(num_latent_frames: int) -> None:
    x, z = video(num_latent_frames), latents(num_latent_frames)
    assert relative_error(ours().encode(x)[0], wanted_moments(x)) < TOLERANCE
    assert relative_error(ours().decode(z)[0].clamp(-1, 1), wanted_video(z)) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 3, 8])
@torch.no_grad()
def test_streamed_chunks_equal_diffusers(chunk: int) -> None:
    x, z = video(12, batch=1), latents(12, batch=1)
    assert relative_error(stream(ours().encode, in_chunks(x, chunk, rate=4)), wanted_moments(x)) < TOLERANCE
    got = stream(ours().decode, in_chunks(z, chunk, rate=1))
    assert relative_error(got.clamp(-1, 1), wanted_video(z)) < TOLERANCE


@torch.no_grad()
def test_interleaved_and_branching_streams_do_not_touch_each_other() -> None:
    model = ours()
    first, second, other = latents(5, seed=1), latents(5, seed=2), latents(3, seed=3)
    _, state_1 = model.decode(first[:, :, :2])
    _, state_2 = model.decode(second[:, :, :3])
    before = [tensor.clone() for tensor in state_1]
    branch, _ = model.decode(other, state_1)
    rest_2, _ = model.decode(second[:, :, 3:], state_2)
    rest_1, _ = model.decode(first[:, :, 2:], state_1)
    assert all(torch.equal(a, b) for a, b in zip(before, state_1, strict=True))
    assert relative_error(rest_1.clamp(-1, 1), wanted_video(first)[:, :, 5:]) < TOLERANCE
    assert relative_error(rest_2.clamp(-1, 1), wanted_video(second)[:, :, 9:]) < TOLERANCE
    expected = wanted_video(torch.cat([first[:, :, :2], other], dim=2))[:, :, 5:]
    assert relative_error(branch.clamp(-1, 1), expected) < TOLERANCE


@torch.no_grad()
def test_interleaved_encodings_equal_diffusers() -> None:
    clips = [video(4, seed=seed) for seed in (4, 5)]
    parts: list[list[Tensor]] = [[], []]
    states: list[State | None] = [None, None]
    for start, end in ((0, 1), (1, 9), (9, 13)):
        for index, clip in enumerate(clips):
            moments, states[index] = ours().encode(clip[:, :, start:end], states[index])
            parts[index].append(moments)
    for clip, part in zip(clips, parts, strict=True):
        assert relative_error(torch.cat(part, dim=2), wanted_moments(clip)) < TOLERANCE


def test_diffusers_loads_what_is_written() -> None:
    theirs = diffusers_class().from_config(SMALL.to_dict())
    theirs.load_state_dict(ours().state_dict(), strict=True)
    assert AutoencoderConfig.from_dict(dict(theirs.config)) == SMALL


def test_published_size_is_built_on_meta() -> None:
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig.wan22())
    assert sum(p.numel() for p in model.parameters()) == 704_688_668
    assert model.latents_std.device.type == "cpu"


def test_tiny_fits_its_share_of_the_package() -> None:
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig.tiny())
    assert sum(p.numel() for p in model.parameters()) < 3_400_000


def test_gradient_reaches_every_parameter_and_no_state() -> None:
    model = Autoencoder(SMALL)
    moments, state = model.encode(video(3))
    assert not any(tensor.requires_grad for tensor in state)
    reconstruction, _ = model.decode(moments.chunk(2, dim=1)[0])
    (reconstruction.square().mean() + moments.square().mean()).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


def test_gradients_equal_diffusers() -> None:
    z = latents(3)
    for model in (ours(), reference()):
        model.zero_grad()
    ours().decode(z)[0].clamp(-1, 1).square().mean().backward()
    reference().decode(z).sample.square().mean().backward()
    theirs = dict(reference().decoder.named_parameters())
    for name, parameter in ours().decoder.named_parameters():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, theirs[name].grad) < 1e-4, name


@torch.no_grad()
def test_states_are_channels_last_from_the_first_frame_on() -> None:
    _, encoder_state = ours().encode(video(1, batch=1))
    _, decoder_state = ours().decode(latents(1, batch=1))
    for tensor in (*encoder_state, *decoder_state):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d)


@torch.no_grad()
def test_bfloat16_stays_near_and_keeps_its_dtype() -> None:
    model = deepcopy(ours()).to(torch.bfloat16)
    z = latents(3)
    expected, _ = ours().decode(z)
    got, state = model.decode(z.to(torch.bfloat16))
    assert {tensor.dtype for tensor in (got, *state)} == {torch.bfloat16}
    assert relative_error(got.float(), expected) < 0.03


def test_training_pass_is_one_graph() -> None:
    model, x = Autoencoder(replace(SMALL, num_res_blocks=1)), video(2, batch=1)

    def reconstruct(x: Tensor) -> Tensor:
        moments, _ = model.encode(x)
        return model.decode(moments.chunk(2, dim=1)[0])[0]

    # the "eager" backend only traces, so it detects graph breaks in seconds
    assert torch.equal(torch.compile(reconstruct, fullgraph=True, backend="eager")(x), reconstruct(x))


def test_channels_last_gives_the_same() -> None:
    x = video(3)
    with torch.no_grad():
        expected, _ = ours().encode(x)
        got, _ = ours().encode(x.to(memory_format=torch.channels_last_3d))
    assert relative_error(got, expected) < TOLERANCE


def test_normalize_uses_the_statistics_and_is_undone() -> None:
    z = latents(2)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (SMALL.latents_mean, SMALL.latents_std))
    assert torch.equal(ours().normalize(z), (z - mean) / std)
    assert torch.allclose(ours().denormalize(ours().normalize(z)), z, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 32, 32), "video has 4 frames; expected 1 \\+ 4k frames in a first call"),
        ((1, 3, 0, 32, 32), "video has 0 frames"),
        ((1, 3, 5, 32, 40), "video is 32 x 40 pixels; expected multiples of 16"),
        ((1, 4, 5, 32, 32), r"video has shape \[1, 4, 5, 32, 32\]; expected \[batch, 3"),
        ((3, 5, 32, 32), r"video has shape \[3, 5, 32, 32\]"),
    ],
)
def test_wrong_video_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours().encode(torch.zeros(shape))


@torch.no_grad()
def test_wrong_state_is_refused() -> None:
    _, encoder_state = ours().encode(video(1))
    _, decoder_state = ours().decode(latents(1))
    with pytest.raises(UserError, match="video has 5 frames; expected 4k frames in a later call"):
        ours().encode(video(2), encoder_state)
    with pytest.raises(UserError, match="state holds .* of the same encoder"):
        ours().encode(video(2)[:, :, 1:], decoder_state)
    with pytest.raises(UserError, match="all calls of a stream have one size"):
        ours().decode(latents(1, batch=1), decoder_state)
    with pytest.raises(UserError, match="latents have 0 frames"):
        ours().decode(latents(0), decoder_state)


def test_config_reads_the_published_file_and_refuses_the_rest() -> None:
    wan22 = AutoencoderConfig.wan22()
    values = wan22.to_dict() | {"_diffusers_version": "0.35.0", "clip_output": False}
    assert AutoencoderConfig.from_dict(values) == wan22
    assert AutoencoderConfig.from_dict(values | {"decoder_base_dim": None}).decoder_base_dim == wan22.base_dim
    for change, message in [
        ({"base_dims": 8}, r"unknown keys \['base_dims'\]"),
        ({"is_residual": False}, "is_residual is False; expected True"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 values; expected a list of 48"),
        ({"latents_std": [0.0] * 48}, r"latents_std\[0\] is 0.0; expected a number from 1e-06"),
        ({"dim_mult": [1, 2, 2, 3]}, "goes from 2 to 3"),
        ({"dim_mult": [1, 2, 4]}, "expected one entry for every level but the last"),
        ({"scale_factor_spatial": 8}, "scale_factor_spatial is 8; expected 16"),
        ({"in_channels": 3}, "in_channels is 3; expected 12"),
    ]:
        with pytest.raises(ConfigError, match=message):
            AutoencoderConfig.from_dict(values | change)
    del values["z_dim"]
    with pytest.raises(ConfigError, match=r"has no keys \['z_dim'\]"):
        AutoencoderConfig.from_dict(values)
