"""The tiny autoencoder against the public TAEHV module, in one call and in several, and its checks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longvideo.errors import ConfigError, UserError
from longvideo.vae import State
from longvideo.vae.config import WAN22_LATENTS_MEAN, WAN22_LATENTS_STD
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder, TinyEncoder, TinyForm
from tests import tae

TOLERANCE = 1e-5
FORMS: tuple[TinyForm, ...] = ("base", "super")
SMALL = TinyAutoencoderConfig("base", z_dim=5, decoder_widths=(8, 6, 4, 4), encoder_width=4)


def small(form: TinyForm) -> TinyAutoencoderConfig:
    return replace(SMALL, form=form)


def decoder(config: TinyAutoencoderConfig, seed: int = 0) -> TinyDecoder:
    torch.manual_seed(seed)
    return TinyDecoder(config).eval()


def encoder(config: TinyAutoencoderConfig, seed: int = 0) -> TinyEncoder:
    torch.manual_seed(seed)
    return TinyEncoder(config).eval()


def latents(num_frames: int, channels: int = 5, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, num_frames, 2, 3, generator=torch.Generator().manual_seed(0))


def video(num_frames: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, num_frames, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def decode_in_calls(module: TinyDecoder, latents_BCTHW: Tensor, *sizes: int) -> Tensor:
    state: State | None = None
    parts = []
    for part in latents_BCTHW.split(list(sizes), dim=2):
        frames, state = module.decode(part, state)
        parts.append(frames)
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_decoder_equals_the_public_module(form: TinyForm) -> None:
    golden = tae.tensors()
    module = tae.decoder(form)
    latents_BCTHW = golden["latents_NTCHW"].transpose(1, 2)
    expected = golden[f"{form}.decoded_corner_NTCHW"].transpose(1, 2)
    for sizes in ((5,), (1, 3, 1)):
        frames = decode_in_calls(module, latents_BCTHW, *sizes)
        assert frames.shape == (1, 3, 17, 64, 96)
        pixels = (frames[..., :16, 72:].clamp(-1, 1) + 1) / 2
        assert (pixels - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_encoder_equals_the_public_module(form: TinyForm) -> None:
    golden = tae.tensors()
    module = tae.encoder(form)
    video_BCTHW = tae.frames().transpose(1, 2) * 2 - 1
    expected = golden[f"{form}.encoded_NTCHW"].transpose(1, 2)
    assert (module.encode_video(video_BCTHW) - expected).abs().max() < TOLERANCE
    for sizes in ((1, 4, 4), (3, 5, 1), (9,)):
        assert (encode_in_calls(module, video_BCTHW, *sizes) - expected).abs().max() < TOLERANCE


def encode_in_calls(module: TinyEncoder, video_BCTHW: Tensor, *sizes: int) -> Tensor:
    state: State | None = None
    parts = []
    for part in video_BCTHW.split(list(sizes), dim=2):
        one, state = module.encode(part, state)
        parts.append(one)
    assert state is not None
    return torch.cat([*parts, module.finish(state)], dim=2)


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_decoding_in_calls_equals_decoding_at_once(form: TinyForm) -> None:
    module = decoder(small(form))
    x = latents(17)
    whole, _ = module.decode(x)
    assert whole.shape == (2, 3, 65, 32, 48)
    for sizes in ((1,) * 17, (1, 3, 3, 3, 3, 3, 1), (8, 8, 1), (3, 8, 6)):
        assert (decode_in_calls(module, x, *sizes) - whole).abs().max() < TOLERANCE


@torch.inference_mode()
def test_a_state_is_not_changed_and_continues_twice() -> None:
    module = decoder(SMALL)
    x = latents(4)
    _, state = module.decode(x[:, :, :2])
    first, _ = module.decode(x[:, :, 2:], state)
    again, _ = module.decode(x[:, :, 2:], state)
    assert torch.equal(first, again)


@torch.inference_mode()
def test_batch_samples_do_not_mix() -> None:
    module, coder = decoder(SMALL), encoder(SMALL)
    x, frames = latents(3), video(9)
    assert (module.decode(x)[0][1:] - module.decode(x[1:])[0]).abs().max() < TOLERANCE
    assert (coder.encode_video(frames)[1:] - coder.encode_video(frames[1:])).abs().max() < TOLERANCE


@torch.inference_mode()
def test_finishing_a_stream_of_whole_groups_adds_nothing() -> None:
    coder = encoder(SMALL)
    first, state = coder.encode(video(8))
    assert first.shape == (2, 5, 2, 2, 3)
    assert coder.finish(state).shape == (2, 5, 0, 2, 3)


@torch.inference_mode()
def test_statistics_are_those_of_latents_before_normalization() -> None:
    config = replace(SMALL, z_dim=48)
    scaled = replace(config, latents_mean=WAN22_LATENTS_MEAN, latents_std=WAN22_LATENTS_STD)
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (WAN22_LATENTS_MEAN, WAN22_LATENTS_STD))
    assert config.takes_normalized and not scaled.takes_normalized
    x = latents(2, channels=48)
    expected, _ = decoder(config).decode(x * std + mean)
    assert (decoder(scaled).decode(x)[0] - expected).abs().max() < TOLERANCE
    encoded = encoder(config).encode_video(video(5))
    assert (encoder(scaled).encode_video(video(5)) * std + mean - encoded).abs().max() < TOLERANCE


@torch.inference_mode()
def test_frames_are_stored_by_pixel_and_networks_compute_in_bf16() -> None:
    scaled = replace(SMALL, z_dim=48, latents_mean=WAN22_LATENTS_MEAN, latents_std=WAN22_LATENTS_STD)
    frames, state = decoder(scaled).to(torch.bfloat16).decode(latents(2, channels=48).to(torch.bfloat16))
    assert frames.dtype == torch.bfloat16 and {x.dtype for x in state} == {torch.bfloat16}
    assert frames.stride(1) == 1 and frames.stride(4) == 3


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_numerical_ones(form: TinyForm) -> None:
    module = decoder(small(form)).double()
    x = latents(2).double().requires_grad_()
    direction = torch.randn_like(x)
    module.decode(x)[0].square().sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        above, below = (module.decode(x + step * direction)[0].square().sum() for step in (1e-6, -1e-6))
    numerical = float(above - below) / 2e-6
    assert abs(float((x.grad * direction).sum()) - numerical) < 1e-5 * abs(numerical)


def test_wrong_inputs_are_refused() -> None:
    module, coder = decoder(SMALL), encoder(SMALL)
    with pytest.raises(UserError, match=r"latents has shape \[2, 16, 3, 2, 3\]; expected \[batch, 5, frames"):
        module.decode(latents(3, channels=16))
    with pytest.raises(UserError, match="latents have 0 frames; expected 1 or more"):
        module.decode(latents(0))
    _, state = module.decode(latents(1))
    with pytest.raises(UserError, match=r"\[2, 8, 1, 2, 3\]; expected \[1, 8, 1, 2, 3\]; all calls of a stream"):
        module.decode(latents(1, batch=1), state)
    with pytest.raises(UserError, match="state holds 8 tensors; expected 9"):
        module.decode(latents(1), state[1:])
    with pytest.raises(UserError, match=r"video has 8 frames; expected 1 \+ 4k"):
        coder.encode_video(video(8))
    with pytest.raises(UserError, match="30 x 48 pixels; expected multiples of 16; crop"):
        coder.encode(video(1)[..., :30, :])
    with pytest.raises(UserError, match="state holds 9 tensors; expected 1 or 10"):
        coder.encode(video(1), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "large"}, "form is 'large'; expected base or super"),
        ({"z_dim": 0}, "z_dim is 0; expected a whole number from 1"),
        ({"decoder_widths": (8, 4)}, r"decoder_widths is \(8, 4\); expected 4 numbers"),
        ({"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 5}, "latents_mean has 4 values; expected a list of 5"),
        ({"latents_std": (1.0,) * 5}, "latents_mean has 0 values"),
    ],
)
def test_wrong_configurations_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)  # type: ignore[arg-type]
