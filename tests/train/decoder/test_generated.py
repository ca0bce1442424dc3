"""Clips that a model generates for the small decoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import chunk_spec
from longvideo.cli.main import main
from longvideo.model.conditioning import batch_texts
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.world import sample_scenes
from longvideo.train.decoder.generated import GeneratedFootage, MixedFootage
from longvideo.training.sampling import sample_latents

SCENES = sample_scenes(3, seed=0, split="train", pair_fraction=0.5)


@pytest.fixture(scope="module")
def footage() -> GeneratedFootage:
    return GeneratedFootage(
        ModelFolder.open("tiny"), SCENES, chunks=1, group=2, seed=5, device=torch.device("cpu"), precision="fp32"
    )


def test_each_clip_is_a_video_of_its_caption_and_seed(footage: GeneratedFootage) -> None:
    latents, opening = footage.draw(1)
    assert latents.shape == (2, 24, footage.num_frames, *footage.latent_size) and opening.tolist() == [True, True]
    folder = ModelFolder.open("tiny")
    # the second clip of the second group is number 3, of the first of three scenes
    texts = batch_texts([[caption(SCENES[0], 3)]], (False,), cut_prefix="")
    features, rows = footage.text_encoder.encode(texts.texts)
    (alone,) = sample_latents(
        footage.transformer,
        folder.settings,
        chunk_spec(folder.settings, folder.vae_config.scale_factor_spatial),
        features_PJD=features[rows],
        rows_NB=texts.rows_NB,
        cuts=(False,),
        seeds=[5 + 3],
    )
    assert (latents[1] - alone[0]).abs().max() < 1e-4 and latents[0].sub(alone[0]).abs().max() > 0.1


class NumberedFootage:
    """Footage whose latents are the number of the content."""

    num_frames, latent_size = 8, (8, 14)

    def draw(self, content: int) -> tuple[Tensor, Tensor]:
        return torch.full((1, 1, 1, 1, 1), content), torch.ones(1, dtype=torch.bool)


@pytest.mark.parametrize(("fraction", "expected"), [(0.25, [3, 7, 11]), (0.5, [1, 3, 5, 7, 9, 11]), (1.0, range(12))])
def test_generated_groups_are_spread_evenly(
    footage: GeneratedFootage, fraction: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(footage, "draw", lambda content: drawn.append(content) or NumberedFootage().draw(content))
    mixed = MixedFootage(NumberedFootage(), footage, generated_fraction=fraction)
    assert [int(mixed.draw(content)[0]) for content in range(12)] == list(range(12))
    assert drawn == list(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data=clips"], "bank.generated_fraction is 0.5; expected 0 with data=clips"),
        (["scenes.height=64"], "scenes have 64x224 pixels; expected 128x224, the size that tiny generates"),
    ],
)
def test_mistakes_are_one_line(
    settings: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: str
) -> None:
    words = ["train", "decoder", "cpu/decoder", "bank.generated_fraction=0.5", *settings]
    assert main([*words, "--output", f"{tmp_path}/run", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
