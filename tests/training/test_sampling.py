"""What training draws on the way is what generation makes of the exported model, with the same prompts and seeds."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings
from longvideo.distill.config import BackboneConfig, Distillation, SampleConfig
from longvideo.distill.dmd_recipe import DmdRecipe
from longvideo.distill.prompts import ChunkScript, DistillStage
from longvideo.distill.roles import LoraSettings, Role
from longvideo.distill.self_forcing import CacheFill
from longvideo.distill.self_forcing import RolloutConfig as DistilledRollout
from longvideo.distributed import Mesh
from longvideo.errors import ConfigError
from longvideo.files import write_json
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.pixels import to_uint8
from longvideo.text.encoder import TextEncoder
from longvideo.train.batch import ViewStage
from longvideo.train.clips.config import ClipTraining, ClipValidationConfig
from longvideo.train.clips.recipe import ClipRecipe
from longvideo.train.clips.views import RandomClip, RandomClips
from longvideo.train.shapeworld.latent_bank import BankConfig
from longvideo.train.shapeworld.recipe import ArRecipe, ArTraining, HeldOutRolloutConfig, TransformerShape
from longvideo.train.shapeworld.scenes import SceneConfig
from longvideo.train.teacher_forcing import TeacherForcingConfig
from tests.checkpoint import small

CPU = torch.device("cpu")
PREFIX = "left left "
SETTINGS = replace(small.SETTINGS, steps=3, guidance=2.0, window_frames=16, offset_per_shot=8)
SHOTS = ("a red ball", "a blue ball moves")
SECONDS = (29 / 24, 64 / 24)  # a chunk, and two


def save(folder: Path, **settings: float | str | bool) -> Path:
    """Write a model whose weights are the same numbers in bf16, in which runs export."""
    parts = (small.transformer(), small.vae(), small.text_encoder())
    for part in parts:
        round_weights(part)
    ModelFolder.save(
        folder,
        settings=replace(SETTINGS, **settings),
        transformer=parts[0],
        vae=parts[1],
        text_encoder=parts[2],
    )
    return folder


@torch.no_grad()
def round_weights(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.copy_(parameter.bfloat16())


def generated(folder: Path, prompts: list[tuple[str, ...]], seconds: tuple[float, ...], **options: Any) -> np.ndarray:
    pipeline = StreamingPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)
    return pipeline.generate_batch(prompts, seconds=seconds, seeds=range(len(prompts)), **options)


def same(sample: np.ndarray, video: np.ndarray) -> bool:
    """Whether two videos are equal but for rounding, which now and then moves a pixel by one."""
    assert sample.shape == video.shape and sample.dtype == video.dtype == np.uint8
    difference = np.abs(sample.astype(int) - video)
    return difference.max() <= 2 and difference.mean() < 0.05


class TextClips(RandomClips):
    """One clip with a cut, whose captions an encoder reads."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__(chunks=2, chunk_frames=8, latents=(4, 4, 6), text=(32, 128))
        self.clips = [RandomClip(SHOTS, (True, True))]
        self._encoder = encoder

    def text(self, caption: str) -> Tensor:
        return self._encoder.encode([caption])[0][0]


@pytest.mark.parametrize("clean_pass", [True, False])
def test_a_sample_of_clips_with_cuts_is_what_the_exported_model_generates(tmp_path: Path, clean_pass: bool) -> None:
    model = save(tmp_path / "model", clean_pass=clean_pass, cut_prefix=PREFIX)
    config = ClipTraining(
        initialize=str(model), stages=[ViewStage(steps=1, batch=1, chunks=2)], validation=ClipValidationConfig(chunks=3)
    )
    recipe = ClipRecipe(config, CPU, Mesh(), dry_run=True)
    folder = ModelFolder.open(model)
    clips = TextClips(folder.load_text_encoder(dtype=torch.float32))
    # the clip has two chunks; its last caption stays in the third
    autoencoder = folder.load_vae(dtype=torch.float32)
    samples = recipe.roll_out(clips, clips.clips[0], autoencoder, seed=0)
    (sample,) = samples.frames
    with torch.no_grad():
        video, _ = autoencoder.decode(autoencoder.denormalize(samples.latents.float()))
    assert samples.latents.dtype == torch.bfloat16
    assert np.abs(to_uint8(video)[0].numpy().astype(int) - sample).mean() < 1  # bf16 latents are rounded
    recipe.export(tmp_path / "export")
    assert same(sample, generated(tmp_path / "export", [SHOTS], SECONDS)[0])
    for name, other in (("cache", {"clean_pass": not clean_pass, "cut_prefix": PREFIX}), ("words", {"cut_prefix": ""})):
        otherwise = save(tmp_path / name, **{"clean_pass": clean_pass} | other)
        assert not same(sample, generated(otherwise, [SHOTS], SECONDS)[0]), name


@pytest.mark.parametrize("clean_pass", [True, False])
def test_a_sample_of_shapeworld_is_what_the_exported_model_generates(tmp_path: Path, clean_pass: bool) -> None:
    model = save(tmp_path / "model")
    settings = ModelSettings(
        window_frames=24, sink_frames=0, pin_shots=False, height=32, width=64, steps=3, guidance=2.0, shift=3.0
    )
    config = ArTraining(
        vae=str(model),
        export_dtype="fp32",
        model=TransformerShape(num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=2, text_len=64),
        settings=replace(settings, clean_pass=clean_pass),
        scenes=SceneConfig(count=4, height=32, width=64),
        bank=BankConfig(clips=2, initial_clips=2, group=2, chunks=3),
        stages=[ViewStage(steps=1, batch=1, chunks=3)],
        rollout=HeldOutRolloutConfig(chunks=3),
    )
    recipe = ArRecipe(config, CPU, Mesh())
    generator = torch.Generator().manual_seed(0)
    for parameter in recipe.transformer.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    prompts = ["a red circle moves left", "a blue square on a green background"]
    samples = np.stack(recipe.roll_out(prompts).frames)
    recipe.export(tmp_path / "export")
    shots = [(prompt,) for prompt in prompts]
    assert same(samples, generated(tmp_path / "export", shots, (sum(SECONDS),)))


@pytest.mark.parametrize("cache_fill", [None, "clean", "last_step"])
def test_a_sample_of_the_student_is_what_the_exported_model_generates(
    tmp_path: Path, cache_fill: CacheFill | None
) -> None:
    """With no cache_fill given, the student's cache is filled as that of the model it is distilled from."""
    model = save(tmp_path / "model", clean_pass=False, cut_prefix=PREFIX)
    (tmp_path / "prompts.jsonl").write_text('{"prompts": ["a red ball", "a blue ball moves"]}\n')
    config = Distillation(
        model=str(model),
        prompts=str(tmp_path / "prompts.jsonl"),
        backbone=BackboneConfig(precision="bf16"),
        lora=LoraSettings(rank=4, alpha=8.0),
        rollout=DistilledRollout(steps=4, cache_fill=cache_fill),
        stages=[DistillStage(frames=16, batch=1, steps=1)],
        samples=SampleConfig(prompts=1, chunks=3, steps=[2]),
    )
    recipe = DmdRecipe(config, CPU)
    generator = torch.Generator().manual_seed(1)
    for weight in recipe.roles.trained(Role.STUDENT).values():
        weight.data.normal_(std=0.2, generator=generator)
    script = ChunkScript((SHOTS[0], SHOTS[1], SHOTS[1]), (True, True, False))
    clip = recipe.source.assemble([script], 0, [0])
    folder = ModelFolder.open(model)
    (sample,) = recipe.generate(clip, folder.load_vae(dtype=torch.float32), 2).frames
    recipe.export(tmp_path / "run" / "model")
    exported = ModelFolder.open(tmp_path / "run" / "model").settings
    assert exported.clean_pass == (cache_fill == "clean") and exported.cut_prefix == PREFIX
    video = generated(tmp_path / "run" / "model", [SHOTS], SECONDS, steps=2)
    assert same(sample, video[0])
    for other in ({"cut_prefix": ""}, {"clean_pass": not exported.clean_pass}):
        write_json(tmp_path / "run" / "model" / "longvideo.json", asdict(replace(exported, **other)))
        assert not same(sample, generated(tmp_path / "run" / "model", [SHOTS], SECONDS, steps=2)[0]), other


@pytest.mark.parametrize(
    ("settings", "objective"),
    [({"offset_per_shot": 8}, {}), ({"pin_shots": True}, {"context": "window"})],
)
def test_shapeworld_with_cuts_refuses_settings_that_differ_from_view_to_view(
    settings: dict[str, Any], objective: dict[str, Any]
) -> None:
    size: dict[str, Any] = {"height": 128, "width": 224, "pin_shots": False}
    shared = {
        "settings": ModelSettings(**size | settings),
        "objective": TeacherForcingConfig(**objective),
    }
    with pytest.raises(ConfigError, match="set bank.cut_fraction=0"):
        ArTraining(**shared)
    assert ArTraining(**shared, bank=BankConfig(cut_fraction=0.0)).bank.cut_fraction == 0
