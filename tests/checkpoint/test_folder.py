"""Model folders survive round trips, are read by diffusers and transformers, and are refused if they are invalid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvideo.checkpoint import diffusers_json
from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.names import strip_wrappers, to_diffusers
from longvideo.checkpoint.settings import ModelSettings
from longvideo.errors import CheckpointError, UserError
from longvideo.files import WriteError
from longvideo.model.attention import Full
from longvideo.model.config import PRESETS
from longvideo.model.layout import TokenLayout
from longvideo.model.spec import ChunkSpec
from tests import golden
from tests.checkpoint import small
from tests.files.test_writing import no_file_longer_than

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return small.save(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def copy(saved: ModelFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved.path, tmp_path / "copy"))


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        folder = ModelFolder.open(path)
        for part in folder.parts:
            folder.check(part)
    return str(caught.value)


def test_what_is_saved_comes_back_bit_for_bit(saved: ModelFolder) -> None:
    folder = ModelFolder.open(saved.path)
    assert folder.settings == small.SETTINGS
    assert folder.transformer_config == small.TRANSFORMER
    assert folder.vae_config == small.VAE
    assert folder.spec == ChunkSpec(grid_height=2, grid_width=3, window_frames=24, sink_frames=0)
    pairs = [
        (small.transformer(), folder.load_transformer()),
        (small.vae(), folder.load_vae()),
        (small.text_encoder(), folder.load_text_encoder()),
    ]
    for before, after in pairs:
        assert not after.training
        assert list(after.state_dict()) == list(before.state_dict())
        assert all(torch.equal(after.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
    assert torch.equal(pairs[1][1].latents_std, pairs[1][0].latents_std)
    prompts = ["A red ball", "a blue BALL moves left"]
    assert torch.equal(pairs[2][0].encode(prompts)[0], pairs[2][1].encode(prompts)[0])


def test_bfloat16_shards_load_in_any_dtype(tmp_path: Path) -> None:
    folder = ModelFolder.save(
        tmp_path / "model",
        settings=small.SETTINGS,
        transformer=small.transformer(),
        dtype=torch.bfloat16,
        max_shard_bytes=10_000,
    )
    assert folder.parts == ("transformer",)
    assert len(list((folder.path / "transformer").glob("*-of-*.safetensors"))) > 1
    weight = folder.load_transformer(dtype=torch.float32).get_parameter("blocks.1.ffn.0.weight")
    assert torch.equal(weight, small.transformer().get_parameter("blocks.1.ffn.0.weight").bfloat16().float())
    assert {p.dtype for p in folder.load_transformer().parameters()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match="has no vae, only transformer"):
        folder.load_vae()


@torch.no_grad()
def test_diffusers_reads_the_transformer_with_equal_outputs(saved: ModelFolder) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(saved.path, subfolder="transformer")
    ours = saved.load_transformer()
    latents, features = torch.randn(1, 4, 8, 4, 6), torch.randn(1, small.SETTINGS.text_len, 128)
    layout = TokenLayout.block_causal(saved.spec, 1)
    text = ours.encode_text(features)
    flow = ours(latents, torch.full((1, 8), 0.7), text, rope=ours.rope(layout), attention=Full())
    expected = theirs(latents, torch.tensor([700.0]), features, return_dict=False)[0]
    assert golden.relative_error(flow, expected) < TOLERANCE


@torch.no_grad()
def test_we_read_what_diffusers_saves(saved: ModelFolder, copy: Path) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    shutil.rmtree(copy / "transformer")
    theirs = WanTransformer3DModel.from_pretrained(saved.path, subfolder="transformer")
    theirs.save_pretrained(copy / "transformer", max_shard_size="20KB")
    assert len(list((copy / "transformer").glob("*.safetensors"))) > 1
    state = ModelFolder.open(copy).load_transformer().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in small.transformer().state_dict().items())


@torch.no_grad()
def test_diffusers_reads_the_vae_with_equal_outputs(saved: ModelFolder) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    theirs = AutoencoderKLWan.from_pretrained(saved.path, subfolder="vae")
    ours = saved.load_vae()
    assert theirs.config["latents_std"] == list(small.VAE.latents_std)
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    moments, _ = ours.encode(video)
    assert golden.relative_error(moments, theirs.encode(video, return_dict=False)[0].parameters) < TOLERANCE
    frames, _ = ours.decode(moments[:, :4])
    assert golden.relative_error(frames.clamp(-1, 1), theirs.decode(moments[:, :4], return_dict=False)[0]) < TOLERANCE


@torch.no_grad()
def test_transformers_reads_tokenizer_and_text_encoder_with_equal_outputs(saved: ModelFolder) -> None:
    from transformers import AutoTokenizer
    from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(saved.path / "tokenizer")
    theirs = UMT5EncoderModel.from_pretrained(saved.path / "text_encoder", dtype=torch.float32).eval()
    prompt = "a red ball, moves LEFT"
    tokens = tokenizer(prompt, return_tensors="pt", padding="max_length", max_length=small.SETTINGS.text_len)
    features = theirs(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    ours = saved.load_text_encoder()
    ids, mask = ours.tokenize([prompt])
    assert torch.equal(ids, tokens.input_ids[:, : ids.shape[1]])
    length = int(mask.sum())
    assert golden.relative_error(ours.encode([prompt])[0][:, :length], features[:, :length]) < TOLERANCE


def test_diffusers_opens_the_folder_as_a_pipeline(saved: ModelFolder) -> None:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    pipeline = WanPipeline.from_pretrained(saved.path)
    assert pipeline.scheduler.config["flow_shift"] == small.SETTINGS.shift
    assert pipeline.config["expand_timesteps"] is True
    assert pipeline.tokenizer("a red ball").input_ids[-1] == 1


def test_a_plain_diffusers_folder_gets_the_5b_defaults(copy: Path) -> None:
    (copy / "longvideo.json").unlink()
    settings = ModelFolder.open(copy).settings
    assert settings == ModelSettings()
    assert (settings.height, settings.width, settings.chunk_frames, settings.window_frames) == (704, 1280, 8, 32)
    assert (settings.sink_frames, settings.steps, settings.guidance, settings.shift) == (8, 50, 5.0, 5.0)


def test_the_published_5b_config_reads() -> None:
    published = {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.35.0.dev0",
        "added_kv_proj_dim": None,
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": 14336,
        "freq_dim": 256,
        "image_dim": None,
        "in_channels": 48,
        "num_attention_heads": 24,
        "num_layers": 30,
        "out_channels": 48,
        "patch_size": [1, 2, 2],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    }
    config = diffusers_json.transformer_config(published, text_len=512)
    assert config == PRESETS["wan2.2-ti2v-5b"]
    for key, value in (("qk_norm", None), ("image_dim", 1280), ("patch_size", [1, 2]), ("num_layers", "30")):
        with pytest.raises(CheckpointError, match=key):
            diffusers_json.transformer_config({**published, key: value}, text_len=512)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_training_checkpoint_replaces_the_folders_transformer(
    saved: ModelFolder, tmp_path: Path, suffix: str
) -> None:
    other = small.transformer(seed=5).state_dict()
    wrapped = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in other.items()}
    file = tmp_path / f"generator{suffix}"
    if suffix == ".pt":
        torch.save({"generator": wrapped, "step": 3}, file)
    else:
        save_file({to_diffusers(strip_wrappers(name)): tensor for name, tensor in wrapped.items()}, file)
    state = ModelFolder.open(file, base=saved.path).load_transformer().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in other.items())


@pytest.mark.usefixtures("saved")
def test_saving_never_harms_an_existing_folder(copy: Path) -> None:
    before = sorted(copy.parent.rglob("*"))
    with pytest.raises(CheckpointError, match="exists"):
        ModelFolder.save(copy, settings=small.SETTINGS, vae=small.vae())
    wrong = ModelSettings(text_len=99)
    with pytest.raises(CheckpointError, match="has 32 text positions; expected text_len=99 of the settings"):
        ModelFolder.save(copy, settings=wrong, transformer=small.transformer(), overwrite=True)
    assert sorted(copy.parent.rglob("*")) == before
    ModelFolder.save(copy, settings=small.SETTINGS, vae=small.vae(), overwrite=True)
    assert ModelFolder.open(copy).parts == ("vae",)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_unchanged_parts_are_copied_as_files(saved: ModelFolder, tmp_path: Path) -> None:
    transformer = small.transformer(seed=5)
    export = ModelFolder.save(
        tmp_path / "export",
        settings=saved.settings,
        transformer=transformer,
        other_parts=saved,
        dtype=torch.bfloat16,
    )
    assert export.parts == saved.parts
    for part in ("vae", "text_encoder"):
        for file in (saved.path / part).iterdir():
            assert (export.path / part / file.name).read_bytes() == file.read_bytes(), file
    state = export.load_transformer().state_dict()
    assert all(torch.equal(state[name], value.bfloat16()) for name, value in transformer.state_dict().items())


def test_parts_with_another_layout_are_copied_tensor_by_tensor(saved: ModelFolder, tmp_path: Path) -> None:
    convert_model(saved, tmp_path / "one.safetensors", ConversionOptions("safetensors"))
    other = ModelFolder.open(tmp_path / "one.safetensors", base=saved.path)
    export = ModelFolder.save(
        tmp_path / "export",
        settings=saved.settings,
        vae=small.vae(seed=5),
        other_parts=other,
        max_shard_bytes=20_000,
    )
    assert export.parts == saved.parts and len(export.weights("transformer").files) > 1
    for part in ("transformer", "text_encoder"):
        original = saved.weights(part)
        assert export.weights(part).infos == original.infos
        assert all(torch.equal(export.weights(part).read(name), original.read(name)) for name in original.infos)
    again = ModelFolder.save(tmp_path / "again", settings=saved.settings, vae=small.vae(seed=6), other_parts=export)
    files = sorted(file.relative_to(export.path) for file in (export.path / "transformer").iterdir())
    assert files == sorted(file.relative_to(again.path) for file in (again.path / "transformer").iterdir())
    assert all((export.path / file).read_bytes() == (again.path / file).read_bytes() for file in files)


@pytest.mark.parametrize("longest", [50, 1000, 50_000])
def test_a_full_disk_while_a_model_is_exported_is_one_line_and_keeps_nothing(
    longest: int, copy: Path, tmp_path: Path
) -> None:
    target = tmp_path / "export"
    with no_file_longer_than(longest), pytest.raises(WriteError) as caught:
        small.save(target)
    assert str(caught.value) == f"cannot write {target}: file too large; no part of it remains"
    assert list(tmp_path.iterdir()) == [copy]
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    with no_file_longer_than(longest), pytest.raises(WriteError, match="file too large; the older one is unchanged"):
        ModelFolder.save(copy, settings=small.SETTINGS, transformer=small.transformer(seed=9), overwrite=True)
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_damaged_weight_file_is_named(copy: Path, part: str) -> None:
    (file,) = (copy / part).glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert str(file) in error_of(copy) and "truncated" in error_of(copy)
    file.unlink()
    assert str(copy / part) in error_of(copy)
    file.write_bytes(content)
    tensors = load_file(file)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.ndim == 2 or tensor.ndim == 5)
    save_file({**tensors, name: tensors[name][:1].clone()}, file)
    message = error_of(copy)
    assert str(file) in message and "1 wrongly shaped" in message
    del tensors[name]
    save_file({**tensors, "surplus": torch.zeros(1)}, file)
    message = error_of(copy)
    assert "1 missing" in message and "1 unexpected: surplus" in message


def test_mistakes_in_json_files_are_named(copy: Path) -> None:
    settings = copy / "longvideo.json"
    good = settings.read_text()
    edit(settings, lambda values: values.update(window_frame=24))
    assert "window_frame" in error_of(copy) and "window_frames" in error_of(copy) and str(settings) in error_of(copy)
    for key, value in (("steps", "many"), ("steps", 0), ("height", 65), ("window_frames", 23), ("shift", -1.0)):
        settings.write_text(good)
        edit(settings, lambda values, key=key, value=value: values.update({key: value}))
        assert key in error_of(copy)
    settings.write_text(good[:-20])
    assert str(settings) in error_of(copy)
    settings.write_text(good)
    for file in ("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"):
        content = (copy / file).read_text()
        (copy / file).write_text(content[:-5])
        assert f"{copy / file} is not JSON" in error_of(copy)
        (copy / file).unlink()
        assert str(copy / file) in error_of(copy)
        (copy / file).write_text(content)
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    assert str(copy / "tokenizer" / "tokenizer.json") in error_of(copy)


def test_parts_that_do_not_belong_together_are_named(copy: Path) -> None:
    edit(copy / "transformer" / "config.json", lambda values: values.update(text_dim=64))
    assert "transformer text_dim is 64 but text encoder d_model is 128" in error_of(copy)
    edit(copy / "transformer" / "config.json", lambda values: values.update(text_dim=128, in_channels=8))
    assert "transformer in_channels is 8 but vae z_dim is 4" in error_of(copy)
    edit(copy / "transformer" / "config.json", lambda values: values.update(in_channels=4, num_layerz=2))
    assert "the keys ['num_layerz'] are unknown" in error_of(copy)
