"""GGUF files, written here with the package gguf, open with the values that the package dequantizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from longvideo.checkpoint import gguf_file, names
from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.opening import open_weights
from longvideo.cli.main import main
from longvideo.errors import CheckpointError, UserError
from longvideo.model.transformer import CausalTransformer
from tests.checkpoint import official, small

Kind = gguf.GGMLQuantizationType
CONFIG = replace(official.TRANSFORMER, ffn_dim=256)
LAYER = "blocks.1.ffn.2.weight"
WIDTH_OF_K = 256


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    torch.manual_seed(1)
    module = CausalTransformer(CONFIG)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("models") / "ours"
    encoder = small.text_encoder()
    return ModelFolder.save(
        folder, settings=small.SETTINGS, transformer=module, vae=official.vae(), text_encoder=encoder
    )


def k_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Return random blocks of a K type, which the package reads but does not write, with scales of ordinary size."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // values, size), dtype=np.uint8)
    scale = np.array([0.01], np.float16).view(np.uint8)
    if kind == Kind.Q6_K:
        blocks[..., -2:] = scale
    else:
        blocks[..., :2] = blocks[..., 2:4] = scale
    return blocks.reshape(shape[0], -1)


def write(file: Path, tensors: Mapping[str, Tensor], kind: Kind, *, architecture: str = "wan") -> dict[str, Tensor]:
    """Write a file as city96's tools do: matrices of the blocks in a type, others in F32. Return the values in it."""
    writer, values = gguf.GGUFWriter(file, architecture), {}
    for name, tensor in tensors.items():
        data, own = tensor.float().numpy(), kind
        if not name.startswith(("blocks.", "enc.")) or data.ndim != 2 or "_rel_b" in name:
            own = Kind.F32
        if data.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(data.shape))
            data = data.reshape(-1, *data.shape[-3:])
        if own in (Kind.Q4_K, Kind.Q6_K) and data.shape[-1] % WIDTH_OF_K == 0:
            stored = k_blocks(data.shape, own)
        else:
            own = Kind.Q8_0 if own in (Kind.Q4_K, Kind.Q6_K) else own
            stored = gguf.quantize(data, own)
        writer.add_tensor(name, stored, raw_dtype=own)
        values[name] = torch.from_numpy(gguf.dequantize(stored, own)).float().view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def state_of(model: ModelFolder) -> dict[str, Tensor]:
    return {name: model.weights("transformer").read(name) for name in model.weights("transformer").infos}


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.Q4_K, Kind.Q6_K])
def test_a_transformer_opens_with_the_values_that_the_package_reads(
    kind: Kind, ours: ModelFolder, tmp_path: Path
) -> None:
    state = state_of(ours)
    file = tmp_path / "wan.gguf"
    expected = write(file, state, kind)
    opened = ModelFolder.open(file, base=ours.path)
    assert opened.parts == ours.parts and opened.notes["general.architecture"] == "wan"
    assert opened.weights("transformer").infos["patch_embedding.weight"].shape == (128, 48, 1, 2, 2)
    loaded = opened.load_transformer(dtype=torch.float32).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert kind in (Kind.Q4_K, Kind.Q6_K) or (loaded[LAYER] - state[LAYER]).abs().max() < 0.05


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin"])
def test_a_file_with_another_name_is_recognized_by_its_content(name: str, tmp_path: Path) -> None:
    values = write(tmp_path / "x.gguf", {"a": torch.randn(4, 32)}, Kind.F32)
    (tmp_path / "x.gguf").rename(tmp_path / name)
    assert torch.equal(open_weights(tmp_path / name).read("a"), values["a"])


def test_a_file_with_the_prefix_of_comfyui_opens(ours: ModelFolder, tmp_path: Path) -> None:
    state = state_of(ours)
    write(tmp_path / "wan.gguf", {f"model.diffusion_model.{name}": x for name, x in state.items()}, Kind.F32)
    opened = ModelFolder.open(tmp_path / "wan.gguf", base=ours.path)
    assert all(torch.equal(value, state[name]) for name, value in state_of(opened).items())


def test_a_quantized_file_is_converted_to_bf16_and_to_nvfp4(
    ours: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = write(tmp_path / "wan.gguf", state_of(ours), Kind.Q8_0)
    assert main(["convert", str(tmp_path / "wan.gguf"), str(tmp_path / "bf16"), "--base", str(ours.path)]) == 0
    stored = ModelFolder.open(tmp_path / "bf16").weights("transformer").read(LAYER)
    assert torch.equal(stored, expected[LAYER].bfloat16())
    opened = ModelFolder.open(tmp_path / "wan.gguf", base=ours.path)
    convert_model(opened, tmp_path / "nvfp4", ConversionOptions(precision="nvfp4"))
    assert ModelFolder.open(tmp_path / "nvfp4").is_packed
    assert main(["info", str(tmp_path / "wan.gguf"), "--base", str(ours.path)]) == 0
    assert "general.architecture: wan" in capsys.readouterr().out


def test_a_large_tensor_is_read_in_pieces_of_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write(tmp_path / "x.gguf", {"blocks.0.x.weight": torch.randn(5, 96)}, Kind.Q8_0)
    monkeypatch.setattr(gguf_file, "VALUES_AT_ONCE", 64)
    weights = gguf_file.open_file(tmp_path / "x.gguf")
    pieces = [len(piece) for piece in weights.tensors["blocks.0.x.weight"].pieces()]
    assert pieces == [64] * 7 + [32]
    assert torch.equal(weights.read("blocks.0.x.weight"), expected["blocks.0.x.weight"])


def test_a_text_encoder_opens_under_the_names_of_llama_cpp(ours: ModelFolder, tmp_path: Path) -> None:
    weights = ours.weights("text_encoder")
    tensors = {names.TEXT_ENCODER_GGUF.theirs(name): weights.read(name) for name in weights.infos}
    assert "enc.blk.0.attn_rel_b.weight" in tensors and not any("SelfAttention" in name for name in tensors)
    write(tmp_path / "umt5.gguf", tensors, Kind.F32, architecture="t5encoder")
    opened = ModelFolder.open(tmp_path / "umt5.gguf", base=ours.path)
    features = [model.load_text_encoder().encode(["a red ball"])[0] for model in (opened, ours)]
    assert torch.equal(*features)


def test_damaged_files_give_one_error(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write(whole, {"blocks.0.x.weight": torch.randn(64, 64), "a.weight": torch.ones(3)}, Kind.Q8_0)
    content, file = whole.read_bytes(), tmp_path / "x.gguf"
    huge_array = b"GGUF" + np.array([3], "<u4").tobytes() + np.array([0, 1, 1], "<u8").tobytes() + b"a"
    huge_array += np.array([9, 4], "<u4").tobytes() + np.array([2**62], "<u8").tobytes()
    damaged = {
        "empty": b"",
        "not GGUF": b"x" * 400,
        "cut": content[: len(content) // 2],
        "cut in the header": content[:60],
        "big-endian": content[:4] + content[4:8][::-1] + content[8:],
        "an array without end": huge_array,
        "an unknown type": content.replace(np.array([Kind.Q8_0], "<u4").tobytes(), np.array([999], "<u4").tobytes()),
    }
    for kind, data in damaged.items():
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x\.gguf is truncated or not GGUF: .+; copy or download it again"):
            gguf_file.open_file(file)
            pytest.fail(kind)
    with pytest.raises(CheckpointError, match="has one set of weights and no entry 'ema'; leave --entry out"):
        ModelFolder.open(whole, entry="ema")


def test_a_type_that_the_package_cannot_read_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    writer.add_tensor("a.weight", np.zeros((1, gguf.GGML_QUANT_SIZES[Kind.Q8_K][1]), np.uint8), raw_dtype=Kind.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"a\.weight is Q8_K, which the package gguf cannot read"):
        gguf_file.open_file(tmp_path / "x.gguf")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.gguf", {"a.weight": torch.ones(3)}, Kind.F32)
    monkeypatch.setattr("longvideo.machine.packages.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"needs the package gguf; run: pip install 'longvideo\[gguf\]'"):
        ModelFolder.open(tmp_path / "x.gguf")
