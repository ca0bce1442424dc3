"""The streaming form of a tiny decoder equals `TinyDecoder.decode`, in pieces of any length, and can be continued."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.pixels import to_uint8
from longvideo.streaming.decoder_convolutions import Grid
from longvideo.streaming.decoders import TinyDecoderModel
from longvideo.streaming.tiny_decoder import TinyStreamingDecoder
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder, TinyForm

CONFIGS: dict[TinyForm, TinyAutoencoderConfig] = {
    "base": TinyAutoencoderConfig("base", 6, (8, 6, 4, 4), latents_mean=(0.1,) * 6, latents_std=(0.7,) * 6),
    "super": TinyAutoencoderConfig("super", 6, (16, 12, 8, 4)),
}
FORMS = pytest.mark.parametrize("form", ["base", "super"])


@cache
def ours(form: TinyForm) -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(CONFIGS[form]).eval()


def latents(num_frames: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 6, num_frames, 2, 3, generator=torch.Generator().manual_seed(seed))


@cache
def decoded(form: TinyForm, num_frames: int) -> Tensor:
    """Return the frames of the definition."""
    with torch.inference_mode():
        return to_uint8(ours(form).decode(latents(num_frames))[0])


def streaming(form: TinyForm, latents_per_step: int = 2) -> TinyStreamingDecoder:
    return TinyStreamingDecoder(ours(form), Grid(2, latents_per_step, 2, 3))


def in_pieces(decoder: TinyStreamingDecoder, z: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([decoder.decode(part) for part in z.split(lengths, dim=2)], dim=1)


@FORMS
@pytest.mark.parametrize("lengths", [[7], [1, 6], [2, 5], [3, 3, 1], [1] * 7])
@pytest.mark.parametrize("latents_per_step", [1, 2, 8])
def test_pieces_of_any_length_give_the_frames_of_the_definition(
    form: TinyForm, lengths: list[int], latents_per_step: int
) -> None:
    result = in_pieces(streaming(form, latents_per_step), latents(7), lengths)
    assert result.shape == (2, 25, 32, 48, 3)
    # the CPU may add in another order for another number of frames
    assert (result.int() - decoded(form, 7).int()).abs().max() <= 1


@FORMS
def test_a_state_is_continued_any_number_of_times(form: TinyForm) -> None:
    decoder, expected = streaming(form), decoded(form, 7)
    assert decoder.state() == ()
    decoder.decode(latents(7)[:, :, :3])
    state = decoder.state()
    for _ in range(2):
        decoder.restore(state)
        result = decoder.decode(latents(7)[:, :, 3:])
        assert (result.int() - expected[:, 9:].int()).abs().max() <= 1
    decoder.restore(())
    assert not decoder.opened
    assert torch.equal(decoder.decode(latents(7)), streaming(form).decode(latents(7)))


@FORMS
def test_warming_up_begins_a_video(form: TinyForm) -> None:
    decoder = streaming(form)
    decoder.decode(latents(3, seed=1))
    decoder.warm_up()
    assert torch.equal(decoder.decode(latents(7)), streaming(form).decode(latents(7)))


@FORMS
def test_a_frame_depends_on_as_many_latents_as_lookback_says(form: TinyForm) -> None:
    network = deepcopy(ours(form)).double()
    z = latents(12).double().requires_grad_()
    network.decode(z)[0][:, :, -4:].sum().backward()
    assert z.grad is not None
    depends = z.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert depends.tolist() == [False] * 3 + [True] * (network.lookback + 1)


@FORMS
def test_a_primed_decoder_continues_inside_a_video(form: TinyForm) -> None:
    length, lookback = 12, ours(form).lookback
    decoder = streaming(form)
    decoder.decode(latents(2, seed=1))
    decoder.begin(inside=True)
    decoder.decode(latents(length)[:, :, -1 - lookback : -1])
    last = decoder.decode(latents(length)[:, :, -1:])
    assert last.shape[1] == 4
    assert (last.int() - decoded(form, length)[:, -4:].int()).abs().max() <= 1


@FORMS
def test_latents_of_another_shape_are_refused(form: TinyForm) -> None:
    for shape in ((1, 6, 2, 2, 3), (2, 5, 2, 2, 3), (2, 6, 0, 2, 3), (2, 6, 2, 3, 2)):
        with pytest.raises(UserError, match=r"latents are .*; expected \[2, 6, 1 or more, 2, 3\]"):
            streaming(form).decode(torch.zeros(shape))


def test_the_model_starts_decoders_with_their_own_state() -> None:
    model = TinyDecoderModel(ours("base"), name="TAEW2.2")
    one, two = (model.start(Grid(2, 3, 2, 3)) for _ in range(2))
    first = one.decode(latents(3))
    assert torch.equal(two.decode(latents(3)), first)
    assert (model.plain(latents(7)).int() - decoded("base", 7).int()).abs().max() <= 1
    assert model.lookback == 8 and model.config is ours("base").config and model.device == torch.device("cpu")


def test_bfloat16_frames_are_close_to_those_of_float32() -> None:
    exact = decoded("base", 7).float()
    rounded = TinyDecoderModel(deepcopy(ours("base")).bfloat16(), name="TAEW2.2")
    decoder = rounded.start(Grid(2, 2, 2, 3))
    result = decoder.decode(latents(7)).float()
    assert (result - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.gpu
@FORMS
def test_a_recorded_step_gives_the_bits_of_a_direct_one(form: TinyForm) -> None:
    network = deepcopy(ours(form)).to("cuda")
    decoder = TinyStreamingDecoder(network, Grid(2, 2, 2, 3))
    direct = in_pieces(decoder, latents(7).cuda(), [1, 2, 2, 2])
    decoder.warm_up()
    assert torch.equal(in_pieces(decoder, latents(7).cuda(), [1, 2, 2, 2]), direct)
    state = decoder.state()
    first = decoder.decode(latents(2, seed=1).cuda())
    decoder.restore(state)
    assert torch.equal(decoder.decode(latents(2, seed=1).cuda()), first)
