"""Windows of a video: the frames that they read, and their latents against those of the whole video."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.errors import UserError
from longvideo.shapeworld.render import SceneBatch, render
from longvideo.shapeworld.world import sample_scene
from longvideo.vae import Autoencoder, AutoencoderConfig
from longvideo.vae.halo import EncodeWindow, encode_latents, encode_window, lookback_frames, temporal_lookback

NUM_LATENTS = 48
FPS = 24
TOLERANCE = 1e-5
SMALL = replace(
    AutoencoderConfig.tiny(), base_dim=4, decoder_base_dim=4, z_dim=2, latents_mean=(0.0,) * 2, latents_std=(1.0,) * 2
)


@cache
def shipped() -> Autoencoder:
    return ModelFolder.open("tiny").load_vae(dtype=torch.float32)


@cache
def clip() -> Tensor:
    """Return two ShapeWorld scenes, [2, 3, 189, 32, 48]."""
    scenes = SceneBatch.from_scenes([sample_scene(seed, split="train") for seed in (1, 2)])
    times = torch.arange(4 * NUM_LATENTS - 3, dtype=torch.float64) / FPS
    return render(scenes, times.expand(2, -1), height=32, width=48)


@cache
@torch.no_grad()
def whole() -> Tensor:
    moments, _ = shipped().encode(clip())
    return shipped().normalize(moments.chunk(2, dim=1)[0])


def encoded(first: int, last: int, lookback: int, **options: int) -> Tensor:
    window = encode_window(first, last, lookback)
    return encode_latents(shipped(), clip()[:, :, window.first_frame : window.end_frame], window, **options)


def seen_frames(config: AutoencoderConfig, latent: int) -> list[int]:
    """Return the frames that the gradient of a latent frame reaches, in float64."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(config).double()
    frames = config.scale_factor_temporal * (latent + 1) + 1
    video = torch.rand(1, 3, frames, 16, 16, dtype=torch.float64).requires_grad_()
    moments, _ = autoencoder.encode(video)
    (gradient,) = torch.autograd.grad(moments[:, :, latent].square().sum(), video)
    return gradient.abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist()


def test_lookback_of_the_published_autoencoder_is_28_latents() -> None:
    assert lookback_frames(AutoencoderConfig.wan22()) == 112
    assert temporal_lookback(AutoencoderConfig.wan22()) == 28
    assert temporal_lookback(AutoencoderConfig.tiny()) == 20


@pytest.mark.parametrize(
    ("config", "lookback"),
    [
        (SMALL, 80),
        (replace(SMALL, num_res_blocks=2), 112),
        (replace(SMALL, temperal_downsample=(True, False, True)), 84),
        (replace(SMALL, temperal_downsample=(False, False, True), scale_factor_temporal=2), 44),
    ],
)
def test_gradient_reaches_the_frames_of_the_lookback_and_no_others(config: AutoencoderConfig, lookback: int) -> None:
    assert lookback_frames(config) == lookback
    latent = temporal_lookback(config) + 2
    own_last = config.scale_factor_temporal * latent
    assert seen_frames(config, latent) == list(range(own_last - lookback, own_last + 1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_together_encode_what_one_pass_encodes(ranks: int) -> None:
    owned, lookback = NUM_LATENTS // ranks, temporal_lookback(shipped().config)
    parts = [encoded(rank * owned, (rank + 1) * owned, lookback) for rank in range(ranks)]
    assert all(part.shape[2] == owned for part in parts)
    assert (torch.cat(parts, dim=2) - whole()).abs().max() < TOLERANCE


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 2), (20, 21), (21, 22), (22, 48), (47, 48)])
def test_any_range_is_exact(first: int, last: int) -> None:
    got = encoded(first, last, temporal_lookback(shipped().config))
    assert (got - whole()[:, :, first:last]).abs().max() < TOLERANCE


def test_opening_frame_counts_as_a_latent_of_the_halo() -> None:
    """A halo that is shorter by one latent frame is exact too: the opening frame before it is the last one needed."""
    lookback, expected = temporal_lookback(shipped().config), whole()[:, :, 40:]
    assert (encoded(40, 48, lookback - 1) - expected).abs().max() < TOLERANCE
    torch.manual_seed(0)
    autoencoder, video = Autoencoder(SMALL).double(), torch.rand(1, 3, 97, 16, 16, dtype=torch.float64)
    errors = []
    for halo in (lookback, lookback - 1, lookback - 2):
        window = encode_window(24, 25, halo)
        with torch.no_grad():
            moments, _ = autoencoder.encode(video[:, :, window.first_frame : window.end_frame])
            exact, _ = autoencoder.encode(video)
        errors.append((moments[:, :, window.drop] - exact[:, :, 24]).abs().max().item())
    assert errors[0] < 1e-12 and errors[1] < 1e-12 and errors[2] > 1e-9


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("lookback", [0, 8, 20, 28])
def test_frames_read_are_those_owned_and_a_halo_for_each_rank(ranks: int, lookback: int) -> None:
    owned = NUM_LATENTS // ranks
    windows = [encode_window(rank * owned, (rank + 1) * owned, lookback) for rank in range(ranks)]
    # after the first rank a whole halo costs 4 frames per latent frame and the opening frame; a halo that is cut off by
    # the start of the video has all earlier frames
    halos = [4 * lookback + 1 if owned * rank > lookback else 4 * owned * rank - 3 for rank in range(1, ranks)]
    assert sum(window.num_frames for window in windows) == 4 * NUM_LATENTS - 3 + sum(halos)
    assert [window.end_frame for window in windows] == [4 * owned * (rank + 1) - 3 for rank in range(ranks)]


def test_windows_of_96_latents_on_4_ranks() -> None:
    windows = [encode_window(24 * rank, 24 * (rank + 1), 28) for rank in range(4)]
    assert [(w.first_frame, w.num_frames, w.drop) for w in windows] == [
        (0, 93, 0),
        (0, 189, 24),
        (76, 209, 29),
        (172, 209, 29),
    ]


@pytest.mark.parametrize("latents_per_piece", [1, 3, 100])
def test_pieces_give_what_one_pass_gives(latents_per_piece: int) -> None:
    got = encoded(30, 35, 20, latents_per_piece=latents_per_piece)
    assert (got - whole()[:, :, 30:35]).abs().max() < TOLERANCE


def test_no_piece_is_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder, lengths = shipped(), []
    encode = autoencoder.encode
    monkeypatch.setattr(
        autoencoder, "encode", lambda video, state: lengths.append(video.shape[2]) or encode(video, state)
    )
    encoded(24, 28, 20, latents_per_piece=4)
    assert lengths == [13, 16, 16, 16, 16, 16, 4]


def test_a_longer_halo_is_nearer() -> None:
    errors = [(encoded(40, 48, lookback) - whole()[:, :, 40:]).norm().item() for lookback in (0, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


def test_frames_of_other_dtypes_become_the_weights() -> None:
    window = encode_window(2, 3, 20)
    frames = clip()[:, :, window.first_frame : window.end_frame]
    expected = encode_latents(shipped(), frames, window)
    assert torch.equal(encode_latents(shipped(), frames.double(), window), expected)
    assert expected.dtype == torch.float32 and not expected.requires_grad


@pytest.mark.parametrize(
    ("first", "last", "lookback", "message"),
    [
        (-1, 3, 20, r"the range of latents is \[-1, 3\)"),
        (3, 3, 20, r"the range of latents is \[3, 3\); expected 0 <= first < last"),
        (5, 3, 20, r"the range of latents is \[5, 3\)"),
        (0, 3, -1, "lookback is -1 latents; expected 0 or more"),
    ],
)
def test_wrong_ranges_are_refused(first: int, last: int, lookback: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode_window(first, last, lookback)


def test_frames_that_are_not_the_window_are_refused() -> None:
    window = encode_window(30, 32, 20)
    with pytest.raises(
        UserError, match=r"expected \[batch, 3, 89, height, width\], the frames \[36, 125\) of the video"
    ):
        encode_latents(shipped(), clip(), window)
    with pytest.raises(UserError, match=r"has no whole latent frames of 4 frames; make it with encode_window"):
        encode_latents(shipped(), clip()[:, :, :3], EncodeWindow(first_frame=0, num_frames=3, drop=0))
    with pytest.raises(UserError, match="has no whole latent frames"):
        encode_latents(shipped(), clip()[:, :, :5], EncodeWindow(first_frame=0, num_frames=5, drop=2))
    with pytest.raises(UserError, match="latents_per_piece is 0; expected 1 or more"):
        encode_latents(shipped(), clip()[:, :, :5], encode_window(0, 2, 20), latents_per_piece=0)
