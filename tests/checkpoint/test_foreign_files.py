"""Files named as by ComfyUI, DiffSynth, Lightning and DeepSpeed, in shards and variants, open as the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.opening import open_weights
from longvideo.checkpoint.saving import SaveOptions, save_weights
from longvideo.errors import CheckpointError
from longvideo.model.transformer import CausalTransformer
from tests.checkpoint import official, small
from tests.checkpoint.random_weights import fingerprints

FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "Wan2.2_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return official.save(tmp_path_factory.mktemp("models") / "ours")


@pytest.fixture(scope="module")
def wan(ours: ModelFolder) -> dict[str, dict[str, Tensor]]:
    """Tensors of each part under official names."""
    folder = ours.path.parent / "wan"
    convert_model(ours, folder, ConversionOptions("official"))
    opened = {part: open_weights(folder / file) for part, file in FILES.items()}
    return {part: {name: weights.read(name) for name in weights.infos} for part, weights in opened.items()}


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def assert_same(opened: ModelFolder, expected: ModelFolder, part: str = "transformer") -> None:
    one, other = opened.weights(part), expected.weights(part)
    opened.check(part)
    assert one.infos.keys() == other.infos.keys()
    assert all(torch.equal(one.read(name), other.read(name)) for name in other.infos)


@pytest.mark.parametrize(
    ("part", "prefix"),
    [
        ("transformer", "model.diffusion_model."),
        ("transformer", "diffusion_model."),
        ("transformer", "pipe.dit."),
        ("transformer", "module.generator.model._fsdp_wrapped_module."),
        ("vae", "first_stage_model."),
        ("vae", "model."),
        ("text_encoder", "text_encoders.umt5xxl.transformer."),
        ("text_encoder", "pipe.text_encoder."),
    ],
)
def test_one_part_opens_under_any_prefix(
    part: str, prefix: str, ours: ModelFolder, wan: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    save_file(prefixed(wan[part], prefix), tmp_path / "x.safetensors")
    opened = ModelFolder.open(tmp_path / "x.safetensors", base=ours.path)
    assert opened.format != "LongLive 2.0 checkpoint"
    assert_same(opened, ours, part)


def test_all_parts_open_from_one_file_of_comfyui(
    ours: ModelFolder, wan: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    encoder = "text_encoders.umt5xxl."
    tensors = {
        **prefixed(wan["transformer"], "model.diffusion_model."),
        **prefixed(wan["vae"], "vae."),
        **prefixed(wan["text_encoder"], f"{encoder}transformer."),
        f"{encoder}logit_scale": torch.tensor(4.6),
    }
    save_file(tensors, tmp_path / "all.safetensors")
    alone = ModelFolder.open(tmp_path / "all.safetensors")
    assert alone.format == "file with several parts" and not alone.missing
    for part in ours.parts:
        assert_same(ModelFolder.open(tmp_path / "all.safetensors", base=ours.path), ours, part)
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "all.safetensors").rename(folder / "all.safetensors")
    assert ModelFolder.open(folder).parts == ours.parts
    save_file({**tensors, "clip_vision.weight": torch.ones(2)}, folder / "all.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors \(clip_vision\.weight\) belong to none of its parts"):
        ModelFolder.open(folder)
    two = {**prefixed(wan["transformer"], "generator."), **prefixed(wan["transformer"], "critic.")}
    save_file({name: x.clone() for name, x in two.items()}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="has more than one transformer, one of them under 'critic.'"):
        ModelFolder.open(tmp_path / "two.safetensors")


Content = Callable[[dict[str, Tensor]], dict[str, object]]
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}


@pytest.mark.parametrize(
    "content",
    [
        lambda own: {"state_dict": prefixed(own, "generator."), "epoch": 3, "optimizer_states": [OPTIMIZER]},
        lambda own: {"module": own, "optimizer": OPTIMIZER, "global_steps": 3, "ds_version": "0.18"},
        lambda own: {"net": own, "step": 3, "optimizer": OPTIMIZER},
        lambda own: {"generator": {**prefixed(own, "model."), "model.blocks.0.ffn.0._extra_state": None}},
        lambda own: {"checkpoint_format": "longlive_generator_te_nvfp4", "generator": prefixed(own, "model.")},
    ],
    ids=["Lightning", "DeepSpeed", "one dict of weights", "TransformerEngine's state", "model_te.pt"],
)
def test_the_only_weights_in_a_checkpoint_of_a_trainer_need_no_entry(
    content: Content, ours: ModelFolder, wan: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    torch.save(content(wan["transformer"]), tmp_path / "x.ckpt")
    assert_same(ModelFolder.open(tmp_path / "x.ckpt", base=ours.path), ours)


def test_several_weights_in_one_checkpoint_are_listed(wan: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    torch.save({"net": wan["transformer"], "net_average": wan["transformer"]}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="several sets of weights; use --entry with one of net, net_average"):
        ModelFolder.open(tmp_path / "x.pt")
    assert ModelFolder.open(tmp_path / "x.pt", entry="net").parts == ("transformer",)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_open_without_an_index_from_their_folder_or_any_of_them(
    suffix: str, ours: ModelFolder, wan: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    tensors = list(wan["transformer"].items())
    for number in range(3):
        own, file = dict(tensors[number::3]), tmp_path / f"model-{number + 1:05d}-of-00003{suffix}"
        save_file(own, file) if suffix == ".safetensors" else torch.save(own, file)
    for path in (tmp_path, tmp_path / f"model-00002-of-00003{suffix}"):
        assert_same(ModelFolder.open(path, base=ours.path), ours)
    (tmp_path / f"model-00003-of-00003{suffix}").unlink()
    with pytest.raises(CheckpointError, match=f"is one of 3 shards, but model-00003-of-00003{suffix} is missing"):
        ModelFolder.open(tmp_path)


@pytest.mark.parametrize("variant", [".fp16.safetensors", ".bin", "in shards"])
def test_a_diffusers_folder_opens_in_its_variants(variant: str, tmp_path: Path) -> None:
    model = official.save(tmp_path / "model")
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        folder = model.path / part
        file = folder / f"{stem}.safetensors"
        tensors = {name: x.half() for name, x in open_tensors(file).items()}
        file.unlink()
        if variant == ".bin":
            name = "pytorch_model" if part == "text_encoder" else stem
            torch.save(tensors, folder / f"{name}.bin")
        elif variant == "in shards":
            save_weights(folder, f"{stem}.fp16", tensors, options=SaveOptions(200_000))
            index = folder / f"{stem}.fp16.safetensors.index.json"
            assert index.is_file()
            index.rename(folder / f"{stem}.safetensors.index.fp16.json")
        else:
            save_file(tensors, folder / f"{stem}{variant}")
    opened = ModelFolder.open(model.path)
    for part in ("transformer", "text_encoder"):
        opened.check(part)
    weight = opened.load_transformer().head.head.weight
    assert torch.equal(weight, official.transformer().head.head.weight.half())


def open_tensors(file: Path) -> dict[str, Tensor]:
    weights = open_weights(file)
    return {name: weights.read(name) for name in weights.infos}


@pytest.mark.parametrize(("channels", "prefix"), [(16, "model.diffusion_model."), (36, ""), (16, "")])
def test_files_of_wan21_and_longlive_1_are_refused_by_that_name(
    channels: int, prefix: str, ours: ModelFolder, wan: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    tensors = {**wan["transformer"], "patch_embedding.weight": torch.zeros(128, channels, 1, 2, 2)}
    message = f"it has {channels} latent channels, as Wan2.1, LongLive 1 and Wan2.2-A14B have; expected the 48 of"
    save_file(prefixed(tensors, prefix), tmp_path / "x.safetensors")
    torch.save({"generator_ema": prefixed(tensors, "model.")}, tmp_path / "x.pt")
    for file, name in (("x.safetensors", "Wan2.1"), ("x.pt", "LongLive 1")):
        for base in (None, ours.path):
            with pytest.raises(CheckpointError, match=f"{file} is of {name}: {message}"):
                ModelFolder.open(tmp_path / file, base=base)


def test_the_autoencoder_of_wan21_is_refused_by_that_name(tmp_path: Path) -> None:
    tensors = {
        "encoder.conv1.weight": torch.zeros(96, 3, 3, 3, 3),
        "decoder.head.0.gamma": torch.ones(96, 1, 1, 1),
        "conv2.weight": torch.zeros(16, 16, 1, 1, 1),
    }
    torch.save(tensors, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointError, match=r"VAE\.pth is of Wan2\.1: it has 16 latent channels"):
        ModelFolder.open(tmp_path / "Wan2.1_VAE.pth")


def test_a_model_of_this_project_may_have_16_latent_channels(tmp_path: Path) -> None:
    config = replace(official.TRANSFORMER, in_channels=16, out_channels=16)
    own = ModelFolder.save(tmp_path / "own", settings=small.SETTINGS, transformer=CausalTransformer(config))
    convert_model(own, tmp_path / "x.safetensors", ConversionOptions("safetensors"))
    opened = ModelFolder.open(tmp_path / "x.safetensors", base=own.path)
    assert fingerprints(opened) == fingerprints(own)
