"""ComfyUI's file of a text encoder has its tokenizer inside, so that no other file is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.opening import open_weights
from longvideo.checkpoint.stored_tokenizer import take_tokenizer
from longvideo.errors import CheckpointError
from longvideo.text.umt5 import UMT5Config, UMT5Encoder
from tests.checkpoint.spiece import FIXTURES, spiece_model

E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0
PROMPT = "a red ball bounces on grass"


def text_encoder() -> dict[str, Tensor]:
    encoder = UMT5Encoder(UMT5Config(vocab_size=420, d_model=32, d_kv=64, d_ff=64, num_layers=2, num_heads=2))
    encoder.initialize(torch.Generator().manual_seed(0))
    return {name: x for name, x in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}


def in_scaled_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with every layer of the blocks in FP8, as ComfyUI's umt5_xxl_fp8_e4m3fn_scaled has them."""
    scaled = {**tensors, "scaled_fp8": torch.empty(0, dtype=E4M3)}
    for name, weight in tensors.items():
        if weight.ndim == 2 and ".layer." in name and "bias" not in name:
            scale = weight.abs().amax() / E4M3_MAX
            scaled[name] = (weight / scale).to(E4M3)
            scaled[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    return scaled


def write(file: Path, tensors: dict[str, Tensor]) -> ModelFolder:
    save_file({name: x.contiguous() for name, x in tensors.items()}, file)
    return ModelFolder.open(file)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled FP8"])
def test_a_file_alone_encodes_with_the_tokenizer_inside(scaled: bool, tmp_path: Path) -> None:
    tensors = in_scaled_fp8(text_encoder()) if scaled else text_encoder()
    opened = write(tmp_path / "umt5.safetensors", {**tensors, "spiece_model": spiece_model()})
    assert opened.parts == ("text_encoder",)
    opened.check("text_encoder")
    encoder = opened.load_text_encoder()
    expected = json.loads((FIXTURES / "spiece_a.json").read_text())[PROMPT]
    ids, mask = encoder.tokenize([PROMPT])
    assert ids[0][mask[0] == 1].tolist() == expected
    assert encoder.encode([PROMPT])[0].isfinite().all()


@pytest.mark.parametrize("place", ["transformer.spiece_model", "spiece_model"])
def test_it_is_found_under_the_prefixes_of_an_all_in_one_file(place: str, tmp_path: Path) -> None:
    prefix = "text_encoders.umt5xxl."
    tensors = {f"{prefix}transformer.{name}": x for name, x in text_encoder().items()}
    for folder in (tmp_path, tmp_path / "folder"):
        folder.mkdir(exist_ok=True)
        opened = write(folder / "all.safetensors", {**tensors, f"{prefix}{place}": spiece_model()})
    for model in (opened, ModelFolder.open(tmp_path / "folder")):
        assert model.load_text_encoder().tokenizer.get_vocab_size() == 420


def test_a_converted_folder_has_the_tokenizer_as_files(tmp_path: Path) -> None:
    opened = write(tmp_path / "umt5.safetensors", {**text_encoder(), "spiece_model": spiece_model()})
    convert_model(opened, tmp_path / "folder", ConversionOptions())
    folder = tmp_path / "folder" / "tokenizer"
    assert (folder / "spiece.model").read_bytes() == (FIXTURES / "spiece_a.model").read_bytes()
    features = [
        model.load_text_encoder().encode([PROMPT])[0] for model in (opened, ModelFolder.open(tmp_path / "folder"))
    ]
    assert torch.equal(*features)


def test_a_folder_of_loose_files_has_it_too_unless_there_is_a_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "loose"
    folder.mkdir()
    write(folder / "umt5.safetensors", {**text_encoder(), "spiece_model": spiece_model()})
    assert ModelFolder.open(folder).load_text_encoder().tokenize([PROMPT])[0].shape[1] > 1
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json is not a usable tokenizer"):
        ModelFolder.open(folder).load_text_encoder()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(9), r"spiece_model is torch.float32 \[9\], one of 1; expected one SentencePiece model"),
        (
            torch.zeros(2**26 + 1, dtype=torch.uint8),
            "expected one SentencePiece model, torch.uint8 of at most 67,108,864",
        ),
    ],
)
def test_a_tensor_of_another_kind_is_refused(tensor: Tensor, message: str, tmp_path: Path) -> None:
    save_file({"spiece_model": tensor}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        take_tokenizer(open_weights(tmp_path / "x.safetensors"))


def test_damage_is_named_with_the_file_and_the_tensor(tmp_path: Path) -> None:
    opened = write(tmp_path / "x.safetensors", {**text_encoder(), "spiece_model": spiece_model()[:-9]})
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors: spiece_model is not a usable SentencePiece model: it ends"
    ):
        opened.load_text_encoder()
