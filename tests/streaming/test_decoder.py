"""The streaming decoder equals that of the autoencoder, in pieces of any length, and its state can be restored."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longvideo.checkpoint.folder import ModelFolder
from longvideo.errors import UserError
from longvideo.pixels import to_uint8
from longvideo.streaming.decoder import StreamingDecoder
from longvideo.streaming.decoder_convolutions import HISTORY, LARGEST_OWN_CONV3D, Grid, PlainConvolution
from longvideo.streaming.decoder_plan import plan_stages
from longvideo.streaming.decoder_stages import fold_upsampling
from longvideo.vae import Autoencoder, AutoencoderConfig
from longvideo.vae.layers import CausalConv3d

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
CPU = torch.device("cpu")


@cache
def ours() -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(SMALL)
    # weights of one and small random biases would hide a missing norm or bias
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("gamma")), std=0.3)
    return model.eval()


def latents(num_frames: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, SMALL.z_dim, num_frames, 2, 3, generator=torch.Generator().manual_seed(seed))


@cache
def decoded(num_frames: int, seed: int) -> Tensor:
    with torch.no_grad():
        video, _ = ours().decode(ours().denormalize(latents(num_frames, seed=seed)), None)
    return to_uint8(video)


def decoder(latents_per_step: int = 1) -> StreamingDecoder:
    return StreamingDecoder(ours(), Grid(2, latents_per_step, 2, 3))


def differing(got: Tensor, expected: Tensor) -> float:
    """Return the share of values that differ, each by at most one step of 255."""
    assert got.shape == expected.shape and got.dtype == torch.uint8
    difference = (got.int() - expected.int()).abs()
    assert difference.max() <= 1
    return (difference > 0).float().mean().item()


def test_an_upsampling_and_its_convolution_are_one_small_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 4, 3, generator=generator), torch.randn(7, 5, 3, 3, generator=generator)
    expected = torch.nn.functional.conv2d(torch.nn.functional.interpolate(x, scale_factor=2), weight, padding=1)
    folded = torch.nn.functional.conv2d(x, fold_upsampling(weight), padding=1).unflatten(1, (2, 2, 7))
    got = torch.empty_like(expected)
    for a in range(2):
        for b in range(2):
            got[:, :, a::2, b::2] = folded[:, a, b, :, a : a + 4, b : b + 3]
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("height", [2, 3])
def test_small_and_large_convolutions_on_a_cpu_are_the_same(height: int) -> None:
    channels, frames = 512, 18
    conv = CausalConv3d(channels, 4, (3, 3, 3)).requires_grad_(False)
    # torch computes only the smaller one itself
    assert (channels * (HISTORY + frames) * height <= LARGEST_OWN_CONV3D) == (height == 2)
    x = torch.randn(2, channels, frames, height, 3, generator=torch.Generator().manual_seed(0))
    assert conv.bias is not None
    convolution = PlainConvolution(conv.weight, conv.bias, Grid(2, frames, height, 3))
    convolution.inputs(frames).copy_(x.permute(0, 2, 3, 4, 1))
    with torch.no_grad():
        expected = torch.nn.functional.conv3d(
            torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias
        ).permute(0, 2, 3, 4, 1)
        assert (convolution(frames) - expected).abs().max() < 1e-5
    assert torch.equal(convolution.buffer[:, :HISTORY], x.permute(0, 2, 3, 4, 1)[:, -HISTORY:])


@pytest.mark.parametrize("pieces", [[5], [1, 4], [2, 3], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("latents_per_step", [1, 3])
def test_it_makes_the_pixels_of_the_autoencoder(pieces: list[int], latents_per_step: int) -> None:
    expected, streaming = decoded(5, 0), decoder(latents_per_step)
    got = torch.cat([streaming.decode(part) for part in latents(5).split(pieces, dim=2)], dim=1)
    # rounding differs for values half way between two steps
    assert differing(got, expected) < 1e-3


def test_a_state_can_be_continued_twice_and_a_new_video_begun() -> None:
    streaming = decoder()
    first, second, other = latents(3), latents(2, seed=1), latents(2, seed=2)
    streaming.decode(first)
    state = streaming.state()
    once, _ = streaming.decode(second), streaming.decode(other)
    streaming.restore(state)
    assert torch.equal(streaming.decode(second), once)
    streaming.restore(())
    assert differing(streaming.decode(latents(5)), decoded(5, 0)) < 1e-3


def test_the_shipped_autoencoder_in_bf16() -> None:
    autoencoder = ModelFolder.open("tiny").load_vae(dtype=torch.bfloat16)
    z = torch.randn(1, autoencoder.config.z_dim, 3, 8, 14, generator=torch.Generator().manual_seed(0))
    exact = ModelFolder.open("tiny").load_vae(dtype=torch.float32)
    with torch.no_grad():
        expected = to_uint8(exact.decode(exact.denormalize(z), None)[0]).float()
        plain = to_uint8(autoencoder.decode(autoencoder.denormalize(z).bfloat16(), None)[0]).float()
    got = StreamingDecoder(autoencoder, Grid(1, 2, 8, 14)).decode(z).float()
    # folded weights are rounded one more time
    assert (got - expected).norm() < 1.2 * (plain - expected).norm() < 1e-2 * expected.norm()


def shared(first_share: float, latents_per_step: int = 1) -> StreamingDecoder:
    grid = Grid(2, latents_per_step, 2, 3)
    return StreamingDecoder(ours(), grid, devices=(CPU, CPU), first_share=first_share)


def test_two_devices_make_the_same_pixels_at_every_boundary() -> None:
    expected = torch.cat([decoder(2).decode(latents(4)), decoder(2).decode(latents(1, seed=1))], dim=1)
    seen = set()
    for percent in range(1, 100, 3):
        split = shared(percent / 100, latents_per_step=2)
        if split.shares in seen:
            continue
        seen.add(split.shares)
        got = split.decode(latents(4))
        state = split.state()
        split.restore(())
        assert torch.equal(torch.cat([got, split.decode(latents(1, seed=1))], dim=1), expected)
        split.restore(state)
        assert split.decode(latents(2, seed=2)).shape[1] == 8
    assert len(seen) > 8


@pytest.mark.parametrize("first_share", [0.05, 0.3, 0.5, 0.9])
def test_the_first_device_takes_about_its_share(first_share: float) -> None:
    first, second = shared(first_share).shares
    assert first + second == pytest.approx(1)
    assert abs(first - first_share) < 0.1
    assert decoder().shares == (1.0,)


@pytest.mark.parametrize("first_share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_of_nothing_or_all_is_refused(first_share: float) -> None:
    with pytest.raises(UserError, match=f"first_share is {first_share}; expected a number above 0 and below 1"):
        shared(first_share)


def test_multiply_adds_are_those_of_the_convolutions_that_run() -> None:
    plan = plan_stages(ours(), Grid(2, 2, 2, 3))
    streaming = decoder(2)
    streaming.decode(latents(1))
    with FlopCounterMode(display=False) as counter:
        streaming.decode(latents(2))
    flops = counter.get_flop_counts()["Global"]
    # attention and the matrix of the latents are not convolutions but batched products
    convolutions = sum(count for name, count in flops.items() if "conv" in str(name))
    shortcuts = sum(count for name, count in flops.items() if "mm" in str(name) and "bmm" not in str(name))
    assert 2 * sum(stage.multiply_adds for stage in plan) == convolutions + shortcuts


def test_a_warmed_up_decoder_begins_a_video() -> None:
    streaming = decoder()
    streaming.decode(latents(2, seed=3))
    streaming.warm_up()
    assert torch.equal(streaming.decode(latents(5)), decoder().decode(latents(5)))


@pytest.mark.gpu
@pytest.mark.parametrize("split", [None, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_recorded_step_makes_the_same_bits_as_the_first_one(split: float | None) -> None:
    autoencoder, gpu = deepcopy(ours()).to("cuda"), torch.device("cuda")
    options = {} if split is None else {"devices": (gpu, gpu), "first_share": split}
    streaming = StreamingDecoder(autoencoder, Grid(2, 1, 2, 3), **options)
    z = latents(5).cuda()
    first = streaming.decode(z).cpu()  # the second latent frame runs directly, the third is replayed
    assert (first.float() - decoded(5, 0).float()).norm() < 2e-3 * decoded(5, 0).float().norm()
    for begin in (lambda: streaming.restore(()), streaming.warm_up):
        begin()
        pieces = [streaming.decode(part).cpu() for part in z.split([2, 1, 2], dim=2)]
        assert torch.equal(torch.cat(pieces, dim=1), first)


@pytest.mark.gpu
def test_an_autoencoder_built_on_cuda_has_its_statistics_there() -> None:
    with torch.device("cuda"):
        model = Autoencoder(SMALL)
    assert model.denormalize(latents(1).cuda()).is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_it_makes_the_pixels_of_the_cpu(dtype: torch.dtype) -> None:
    autoencoder = deepcopy(ours()).to("cuda", dtype)
    streaming = StreamingDecoder(autoencoder, Grid(2, 1, 2, 3))
    got = torch.cat([streaming.decode(part.cuda()).cpu() for part in latents(5).split([2, 3], dim=2)], dim=1)
    expected = decoded(5, 0).float()
    assert (got.float() - expected).norm() < (2e-3 if dtype == torch.float32 else 5e-2) * expected.norm()


@cache
def wide() -> Autoencoder:
    """Return an autoencoder whose convolutions can compute in E4M3."""
    torch.manual_seed(1)
    model = Autoencoder(replace(SMALL, decoder_base_dim=16))
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("gamma")), std=0.1)
    return model.eval()


def in_fp8(autoencoder: Autoencoder, devices: tuple[torch.device, torch.device] | None = None) -> StreamingDecoder:
    return StreamingDecoder(autoencoder, Grid(2, 1, 2, 3, fp8=True), devices=devices, first_share=0.5)


def test_fp8_gives_the_same_bits_in_pieces_on_two_devices_and_after_a_state() -> None:
    expected = in_fp8(wide()).decode(latents(5))
    for streaming in (in_fp8(wide()), in_fp8(wide(), (CPU, CPU))):
        parts = latents(5).split([2, 1, 2], dim=2)
        got = [streaming.decode(part) for part in parts[:2]]
        state = streaming.state()
        streaming.decode(latents(2, seed=3))
        streaming.restore(state)
        assert torch.equal(torch.cat([*got, streaming.decode(parts[2])], dim=1), expected)
        streaming.begin()
        assert torch.equal(streaming.decode(latents(5)), expected)


def test_fp8_is_near_bf16_with_the_shipped_autoencoder() -> None:
    autoencoder = ModelFolder.open("tiny").load_vae(dtype=torch.bfloat16)
    z = torch.randn(1, autoencoder.config.z_dim, 5, 8, 14, generator=torch.Generator().manual_seed(0))
    expected, got = (StreamingDecoder(autoencoder, Grid(1, 4, 8, 14, fp8)).decode(z).double() for fp8 in (False, True))
    psnr = 10 * torch.log10(255**2 / (got - expected).square().mean())
    assert 43 < psnr < 70


@pytest.mark.gpu
def test_fp8_on_cuda_makes_the_pixels_of_its_definition() -> None:
    expected = in_fp8(wide()).decode(latents(5)).float()
    streaming = in_fp8(deepcopy(wide()).to("cuda", torch.bfloat16))
    first = streaming.decode(latents(5).cuda()).cpu()
    assert (first.float() - expected).norm() < 5e-2 * expected.norm()
    streaming.begin()
    assert torch.equal(streaming.decode(latents(5).cuda()).cpu(), first)


def test_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"latents are \[1, 6, 2, 2, 3\]; expected \[2, 6, 1 or more, 2, 3\]"):
        decoder().decode(latents(2, batch=1))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("latents_per_step", [1, 3])
def test_a_shared_buffer_changes_no_bit(latents_per_step: int, fp8: bool) -> None:
    grid = Grid(2, latents_per_step, 2, 3, fp8)
    autoencoder = wide() if fp8 else ours()
    own, sharing = (StreamingDecoder(autoencoder, x) for x in (grid, replace(grid, shares_buffer=True)))
    for z in latents(7).split([1, 3, 2, 1], dim=2):
        assert torch.equal(sharing.decode(z), own.decode(z))
    state = sharing.state()
    once = sharing.decode(latents(2, seed=1))
    sharing.begin(inside=True)
    sharing.decode(latents(2, seed=2))
    sharing.restore(state)
    assert torch.equal(sharing.decode(latents(2, seed=1)), once)
    assert torch.equal(own.decode(latents(2, seed=1)), once)
