"""Conversions write the requested format, continue after an interruption, and never leave an incomplete result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longvideo.checkpoint import conversion
from longvideo.checkpoint.choices import StoredPrecision, TargetName
from longvideo.checkpoint.conversion import ConversionOptions, Progress, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.tensors import Weights
from longvideo.errors import CheckpointError, UserError
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import Rule
from longvideo.quantization.convert import quantize_layers
from longvideo.quantization.linear import NVFP4Linear
from tests.checkpoint import official, small
from tests.checkpoint.random_weights import fingerprints

SHARD_BYTES = 100_000


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return official.save(tmp_path_factory.mktemp("models") / "ours")


class Cut(KeyboardInterrupt):
    """An interrupt at a certain byte, as by Ctrl-C."""


def cut_after(num_bytes: int) -> Progress:
    left = [num_bytes]

    def on_bytes(count: int) -> None:
        left[0] -= count
        if left[0] < 0:
            raise Cut

    return Progress(on_bytes=on_bytes)


@pytest.mark.parametrize("target", ["longvideo", "official"])
def test_a_conversion_that_was_interrupted_continues(target: TargetName, ours: ModelFolder, tmp_path: Path) -> None:
    options = ConversionOptions(target, max_shard_bytes=SHARD_BYTES)
    total = sum(ours.weights(part).num_bytes for part in ours.parts)
    destination, temporary = tmp_path / "result", tmp_path / ".result.part"
    with pytest.raises(Cut):
        convert_model(ours, destination, options, progress=cut_after(total * 6 // 10))
    finished = {file: file.stat().st_ino for file in temporary.rglob("*.safetensors")}
    assert len(finished) > 3 and not destination.exists()
    seen: list[int] = []
    convert_model(ours, destination, options, progress=Progress(seen.append, seen.append))
    assert seen[0] == total == sum(seen[1:])
    kept = {file: (destination / file.relative_to(temporary)).stat().st_ino for file in finished}
    assert kept == finished, "a finished shard was written again"
    assert not temporary.exists()
    assert fingerprints(ModelFolder.open(destination)) == fingerprints(ours)


def test_a_conversion_starts_again_if_source_or_options_differ(tmp_path: Path) -> None:
    source, destination = official.save(tmp_path / "source"), tmp_path / "result"
    total = sum(source.weights(part).num_bytes for part in source.parts)
    options = ConversionOptions(max_shard_bytes=SHARD_BYTES)
    with pytest.raises(Cut):
        convert_model(source, destination, options, progress=cut_after(total // 2))
    other = ModelFolder.save(
        source.path,
        settings=small.SETTINGS,
        transformer=official.transformer(1),
        vae=official.vae(1),
        text_encoder=small.text_encoder(),
        overwrite=True,
    )
    with pytest.raises(Cut):
        convert_model(other, destination, options, progress=cut_after(total // 2))
    convert_model(other, destination, ConversionOptions(precision="bf16", max_shard_bytes=SHARD_BYTES))
    weights = ModelFolder.open(destination).load_transformer().state_dict()
    expected = official.transformer(1).state_dict()
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_precision_is_of_the_transformer_and_packing_equals_quantizing_in_memory(
    ours: ModelFolder, tmp_path: Path
) -> None:
    convert_model(
        ours, tmp_path / "packed", ConversionOptions(precision="nvfp4", rule=Rule.STATIC6, keep=("blocks.0.*",))
    )
    packed = ModelFolder.open(tmp_path / "packed")
    expected = ours.load_transformer()
    quantize_layers(expected, Rule.STATIC6, keep=("blocks.0.*",))
    state = packed.load_transformer().state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        same = [x.reshape(-1).view(torch.uint8) for x in (state[name], tensor)]
        assert torch.equal(*same), name
    assert packed.load_vae().decoder.conv_in.weight.dtype == torch.float32
    with pytest.raises(CheckpointError, match="has packed 4-bit weights, which this format cannot store"):
        convert_model(packed, tmp_path / "wan", ConversionOptions("official"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_packed_weights_go_back_to_the_values_that_their_codes_represent(
    precision: StoredPrecision, ours: ModelFolder, tmp_path: Path
) -> None:
    convert_model(ours, tmp_path / "packed", ConversionOptions(precision="nvfp4"))
    packed = ModelFolder.open(tmp_path / "packed")
    convert_model(packed, tmp_path / "wan", ConversionOptions("official", precision))
    unpacked = ModelFolder.open(tmp_path / "wan")
    assert not unpacked.is_packed
    dtype = conversion.DTYPES[precision]
    layer = packed.load_transformer().get_submodule("blocks.1.ffn.2")
    assert isinstance(layer, NVFP4Linear)
    value = unpacked.weights("transformer").read("blocks.1.ffn.2.weight")
    assert value.dtype == dtype and torch.equal(value, reference.dequantize(layer.quantized_weight, dtype))
    convert_model(unpacked, tmp_path / "again", ConversionOptions(precision="nvfp4"))
    before, after = (ModelFolder.open(tmp_path / name).weights("transformer") for name in ("packed", "again"))
    codes = [weights.read("blocks.1.ffn.2.weight_codes") for weights in (before, after)]
    assert (codes[0] == codes[1]).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_any_floating_dtype_goes_to_every_target_and_back(
    dtype: torch.dtype, ours: ModelFolder, tmp_path: Path
) -> None:
    part = ours.stored["transformer"]
    values = {name: part.weights.read(name).to(dtype) for name in part.weights.infos}
    own = replace(ours, stored={**ours.stored, "transformer": part.with_weights(Weights.of(values))})
    files: dict[TargetName, str] = {
        "longvideo": "a",
        "official": "b",
        "longlive": "c.pt",
        "safetensors": "d.safetensors",
    }
    for target, name in files.items():
        convert_model(own, tmp_path / name, ConversionOptions(target))
        again = ModelFolder.open(tmp_path / name, base=ours.path).weights("transformer")
        for tensor, value in values.items():
            back = again.read(tensor)
            assert back.dtype == dtype and torch.equal(back.view(torch.uint8), value.view(torch.uint8)), (
                target,
                tensor,
            )
    convert_model(own, tmp_path / "packed", ConversionOptions(precision="nvfp4"))
    assert ModelFolder.open(tmp_path / "packed").load_transformer(dtype=torch.bfloat16).eval()


def test_what_a_format_cannot_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a format; use one of longvideo, diffusers"):
        ConversionOptions("wan")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="precision is 'fp4'; expected one of"):
        ConversionOptions(precision="fp4")  # type: ignore[arg-type]
    vae_only = ModelFolder.save(tmp_path / "vae", settings=small.SETTINGS, vae=small.vae())
    with pytest.raises(CheckpointError, match="has no transformer"):
        convert_model(vae_only, tmp_path / "x.pt", ConversionOptions("longlive"))


def test_a_full_disk_is_noticed_before_anything_is_written(
    ours: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = conversion.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _path: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"has 0\.1 MB free, 3\.7 MB are needed"):
        convert_model(ours, tmp_path / "result", ConversionOptions())
    assert not (tmp_path / "result").exists()


def test_what_killed_conversions_left_is_removed(ours: ModelFolder, tmp_path: Path) -> None:
    for left in (".result.01234567.part", ".result.pt.89abcdef.part"):
        (tmp_path / left).mkdir()
    other = tmp_path / ".result_2.01234567.part"
    other.mkdir()
    convert_model(ours, tmp_path / "result", ConversionOptions())
    convert_model(ours, tmp_path / "result.pt", ConversionOptions("longlive"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "result", "result.pt"]


def test_a_destination_that_exists_is_only_replaced_with_overwrite(ours: ModelFolder, tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    with pytest.raises(UserError, match="exists; choose another name or add --overwrite"):
        convert_model(ours, tmp_path / "result", ConversionOptions())
    convert_model(ours, tmp_path / "result", ConversionOptions(), overwrite=True)
    assert ModelFolder.open(tmp_path / "result").parts == ours.parts
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_the_plain_diffusers_folder_has_no_settings_of_this_project(ours: ModelFolder, tmp_path: Path) -> None:
    convert_model(ours, tmp_path / "plain", ConversionOptions("diffusers"))
    assert not (tmp_path / "plain" / "longvideo.json").exists()
    index = json.loads((tmp_path / "plain" / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert ModelFolder.open(tmp_path / "plain").format == "diffusers folder"


def test_weights_of_another_entry_or_adapter_are_not_mixed_in(ours: ModelFolder, tmp_path: Path) -> None:
    two = {f"generator{suffix}": official.transformer(seed).state_dict() for seed, suffix in ((1, ""), (2, "_ema"))}
    torch.save(two, tmp_path / "two.pt")
    options = ConversionOptions(max_shard_bytes=SHARD_BYTES)
    first, second = (ModelFolder.open(tmp_path / "two.pt", base=ours.path, entry=entry) for entry in two)
    with pytest.raises(Cut):
        convert_model(first, tmp_path / "result", options, progress=cut_after(10 * SHARD_BYTES))
    convert_model(second, tmp_path / "result", options)
    assert fingerprints(ModelFolder.open(tmp_path / "result")) == fingerprints(second)
    lora = {f"blocks.0.self_attn.q.lora_{x}.weight": torch.ones(s) for x, s in (("A", (4, 128)), ("B", (128, 4)))}
    torch.save(lora, tmp_path / "lora.pt")
    with pytest.raises(Cut):
        added = ModelFolder.open(tmp_path / "lora.pt", base=ours.path)
        convert_model(added, tmp_path / "other", options, progress=cut_after(10 * SHARD_BYTES))
    torch.save({name: 2 * x for name, x in lora.items()}, tmp_path / "lora.pt")
    added = ModelFolder.open(tmp_path / "lora.pt", base=ours.path)
    convert_model(added, tmp_path / "other", options)
    assert fingerprints(ModelFolder.open(tmp_path / "other")) == fingerprints(added)


def test_a_source_that_changes_during_the_conversion_is_an_error(tmp_path: Path) -> None:
    source = official.save(tmp_path / "source")
    file = tmp_path / "source" / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match="changed during the conversion"):
        convert_model(source, tmp_path / "result", ConversionOptions(), progress=Progress(lambda _total: file.touch()))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_overwriting_replaces_a_model_and_nothing_else(ours: ModelFolder, tmp_path: Path) -> None:
    own = official.save(tmp_path / "own")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    refusals: list[tuple[str, TargetName, str]] = [
        ("notes", "longvideo", "is not a model in a known format"),
        ("own", "safetensors", "does not end in .safetensors"),
        ("model.pt", "safetensors", "does not end in .safetensors"),
    ]
    for destination, target, says in refusals:
        with pytest.raises(UserError, match=says):
            convert_model(ours, tmp_path / destination, ConversionOptions(target), overwrite=True)
    with pytest.raises(UserError, match="of the source and is not replaced"):
        convert_model(ModelFolder.open(own.path / "transformer"), own.path, ConversionOptions(), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "notes", "own"]
    convert_model(own, own.path, ConversionOptions(precision="bf16"), overwrite=True)
    assert ModelFolder.open(own.path).load_transformer().head.head.weight.dtype == torch.bfloat16
    convert_model(ours, tmp_path / "link", ConversionOptions())
    assert (tmp_path / "link").is_symlink() and ModelFolder.open(tmp_path / "real").parts == ours.parts
