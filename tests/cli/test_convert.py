"""`longvideo convert`, `quantize` and `merge` write complete models, or report one line and leave no files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvideo.checkpoint.conversion import ConversionOptions, Progress, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main
from longvideo.errors import CheckpointError
from longvideo.files import BusyError
from tests.checkpoint import official, small
from tests.checkpoint.random_weights import fingerprints
from tests.files.test_writing import no_file_longer_than


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return official.save(tmp_path_factory.mktemp("models") / "ours")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_8_bits_are_packed_as_if_they_had_been_bf16(
    dtype: torch.dtype, ours: ModelFolder, tmp_path: Path
) -> None:
    convert_model(ours, tmp_path / "eight", ConversionOptions(precision="bf16"))
    file = tmp_path / "eight" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    eight, sixteen = tmp_path / "eight", tmp_path / "sixteen"
    assert main(["convert", str(eight), str(sixteen), "--precision", "bf16"]) == 0
    assert main(["convert", str(sixteen), str(tmp_path / "expected"), "--precision", "nvfp4"]) == 0
    assert main(["convert", str(eight), str(tmp_path / "converted"), "--precision", "nvfp4"]) == 0
    assert main(["quantize", str(eight), str(tmp_path / "quantized")]) == 0
    expected = tmp_path / "expected" / file.relative_to(eight)
    for result in ("converted", "quantized"):
        assert (tmp_path / result / file.relative_to(eight)).read_bytes() == expected.read_bytes()


def test_one_file_of_the_transformer_opens_with_a_base(ours: ModelFolder, tmp_path: Path) -> None:
    file = tmp_path / "transformer.safetensors"
    assert main(["convert", str(ours.path), str(file), "--to", "safetensors", "--precision", "bf16"]) == 0
    assert load_file(file).keys() == official.transformer().state_dict().keys()
    assert [path.name for path in tmp_path.iterdir()] == ["transformer.safetensors"]
    with pytest.raises(CheckpointError, match="has one set of weights and no entry 'generator'"):
        ModelFolder.open(file, base=ours.path, entry="generator")
    opened = ModelFolder.open(file, base=ours.path)
    assert opened.parts == ours.parts and opened.settings == ours.settings


FOLDERS = {"longvideo": "result", "diffusers": "result", "official": "result"}


FILES = {"longlive": "result.pt", "safetensors": "result.safetensors"}


@pytest.mark.parametrize("longest", [100, 20_000, 200_000])
@pytest.mark.parametrize(("target", "name"), [*FOLDERS.items(), *FILES.items()])
def test_a_full_disk_is_one_line_and_leaves_no_files(
    target: str, name: str, longest: int, ours: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / name
    command = ["convert", str(ours.path), str(result), "--to", target, "--shard-gb", "0.001", "--overwrite"]
    with no_file_longer_than(longest):
        assert main(command) == 2
    assert capsys.readouterr().err == f"error: cannot write {result}: file too large; no part of it remains\n"
    assert list(tmp_path.iterdir()) == []
    assert main(command) == 0
    before = {file: file.read_bytes() for file in [result, *result.rglob("*")] if file.is_file()}
    with no_file_longer_than(longest):
        assert main(command) == 2
    assert capsys.readouterr().err == f"error: cannot write {result}: file too large; the older one is unchanged\n"
    assert list(tmp_path.iterdir()) == [result]
    assert {file: file.read_bytes() for file in before} == before


def test_a_full_disk_while_a_lora_or_a_packed_or_merged_model_is_written_leaves_no_files(
    ours: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {f"blocks.0.self_attn.q.lora_{x}.weight": torch.ones(s) for x, s in (("A", (4, 128)), ("B", (128, 4)))}
    torch.save(lora, tmp_path / "lora.pt")
    result, adapter = tmp_path / "result", tmp_path / "lora"
    assert main(["convert", str(tmp_path / "lora.pt"), str(adapter), "--to", "lora"]) == 0
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    for command in (
        ["convert", str(tmp_path / "lora.pt"), str(result), "--to", "lora"],
        ["quantize", str(ours.path), str(result)],
        ["merge", str(ours.path), str(adapter), str(result)],
    ):
        with no_file_longer_than(1000):
            assert main(command) == 2
        assert capsys.readouterr().err == f"error: cannot write {result}: file too large; no part of it remains\n"
        assert sorted(tmp_path.iterdir()) == before


def test_a_second_conversion_into_one_target_is_refused(
    ours: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {f"blocks.0.self_attn.q.lora_{x}.weight": torch.ones(s) for x, s in (("A", (4, 128)), ("B", (128, 4)))}
    torch.save(lora, tmp_path / "lora.pt")
    result, adapter, source = tmp_path / "result", tmp_path / "lora", str(ours.path)
    assert main(["convert", str(tmp_path / "lora.pt"), str(adapter), "--to", "lora"]) == 0
    codes: dict[str, int] = {}

    def meanwhile(_total: int) -> None:
        codes["convert"] = main(["convert", source, str(result), "--overwrite"])
        codes["quantize"] = main(["quantize", source, str(result), "--overwrite"])
        codes["merge"] = main(["merge", source, str(adapter), str(result), "--overwrite"])
        codes["lora"] = main(["convert", str(tmp_path / "lora.pt"), str(result), "--to", "lora", "--overwrite"])
        with pytest.raises(BusyError):
            small.save(result)

    convert_model(ours, result, ConversionOptions(), progress=Progress(meanwhile))
    assert codes == dict.fromkeys(codes, 2) and len(codes) == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"error: {result} is being written by another process; wait for it, or choose another name"] * 4
    assert fingerprints(ModelFolder.open(result)) == fingerprints(ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "lora.pt", "result"]
