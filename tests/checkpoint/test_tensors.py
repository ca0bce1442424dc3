"""Weight files: strict loading, sharding, and errors for invalid files."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longvideo.checkpoint import pickle_file
from longvideo.checkpoint.modules import OnMeta, check_fits, load_weights, own_tensors
from longvideo.checkpoint.opening import WeightReader, open_weights
from longvideo.checkpoint.saving import SaveOptions, save_weights
from longvideo.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.randn(1, 3) / 2)
        self.second = nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))


def tied(seed: int) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def on_meta() -> Tied:
    with OnMeta():
        return Tied()


def linear_tensors(num_layers: int) -> dict[str, Tensor]:
    return {f"{index}.weight": torch.full((4, 4), float(index)) for index in range(num_layers)}


def stack(num_layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(num_layers)))


def error_of(path: Path, module: nn.Module) -> str:
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load_weights(module, open_weights(path))
    assert all(map(torch.equal, before, module.parameters())), "something was loaded before the check"
    return str(caught.value)


def test_a_module_on_meta_takes_the_saved_values_and_keeps_its_ties(tmp_path: Path) -> None:
    module, loaded = tied(0), on_meta()
    save_weights(tmp_path, "model", own_tensors(module))
    assert "second.weight" not in load_file(tmp_path / "model.safetensors")
    load_weights(loaded, open_weights(tmp_path))
    assert loaded.second.weight is loaded.first.weight
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("stored_name", ["first.weight", "second.weight"])
def test_either_name_of_a_tied_parameter_suffices(tmp_path: Path, stored_name: str) -> None:
    module = tied(0)
    tensors = own_tensors(module)
    tensors[stored_name] = tensors.pop("first.weight")
    save_weights(tmp_path, "model", tensors)
    loaded = on_meta()
    load_weights(loaded, open_weights(tmp_path))
    assert torch.equal(loaded.first.weight, module.first.weight)


def test_dtype_applies_to_floating_tensors_only(tmp_path: Path) -> None:
    save_weights(tmp_path, "model", own_tensors(tied(0)), dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["first.weight"].dtype == torch.bfloat16 and stored["steps"].dtype == torch.int64
    loaded = on_meta()
    load_weights(loaded, open_weights(tmp_path), dtype=torch.float32)
    assert torch.equal(loaded.first.weight, tied(0).first.weight.bfloat16().float())
    assert loaded.steps.dtype == torch.int64


def test_shards_stay_below_the_limit_and_read_back_equal(tmp_path: Path) -> None:
    tensors = linear_tensors(5)
    save_weights(tmp_path, "model", tensors, options=SaveOptions(2 * 4 * 4 * 4))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)] + ["model.safetensors.index.json"]
    assert json.loads((tmp_path / names[-1]).read_text())["metadata"] == {"total_size": 5 * 64}
    module = stack(5)
    load_weights(module, open_weights(tmp_path))
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in tensors.items())
    save_weights(tmp_path, "model", tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"], "stale shards must go"


def test_a_failed_save_leaves_the_old_file_whole(tmp_path: Path) -> None:
    save_weights(tmp_path, "model", linear_tensors(1))
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(NotImplementedError):
        save_weights(tmp_path, "model", {"a": torch.empty(2, device="meta")})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    tensors = linear_tensors(11) | {"0.weight": torch.zeros(4, 5)} | {f"{n}.weight": torch.zeros(1) for n in (20, 21)}
    del tensors["3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    message = error_of(tmp_path, stack(12))
    assert "2 missing: 3.weight, 11.weight" in message
    assert "2 unexpected: 20.weight, 21.weight" in message
    assert "1 wrongly shaped: 0.weight [4, 5], expected [4, 4]" in message
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "12 missing: 0.weight, 1.weight, 2.weight, 3.weight, 4.weight" in error_of(tmp_path, stack(12))
    assert "7.weight and 4 more" in error_of(tmp_path, stack(12))


@pytest.mark.parametrize("kept_bytes", [0, 5, 40, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept_bytes: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(linear_tensors(2), file)
    file.write_bytes(file.read_bytes()[:kept_bytes])
    message = error_of(file, stack(2))
    assert str(file) in message and "truncated or not safetensors" in message


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"<html>404 not found</html>" * 10)
    assert f"{file} (260 bytes) is truncated or not safetensors" in error_of(file, stack(1))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "model.safetensors") in error_of(tmp_path / "model.safetensors", stack(1))
    assert str(tmp_path) in error_of(tmp_path, stack(1))


def write_index(folder: Path, weight_map: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a.bin", 3])
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, target: object) -> None:
    save_file(linear_tensors(1), tmp_path / "secret.safetensors")
    folder = tmp_path / "inner"
    folder.mkdir()
    message = error_of(write_index(folder, {"0.weight": target}), stack(1))
    assert "expected the name of a .safetensors file in the same folder" in message


def test_an_index_must_agree_with_its_files(tmp_path: Path) -> None:
    save_file(linear_tensors(1), tmp_path / "a.safetensors")
    index = write_index(tmp_path, {"0.weight": "a.safetensors", "1.weight": "a.safetensors"})
    assert "lists 1 tensors that are not in its files: 1.weight" in error_of(index, stack(2))
    index = write_index(tmp_path, {"0.weight": "a.safetensors", "1.weight": "b.safetensors"})
    assert f"no weight file {tmp_path / 'b.safetensors'}" in error_of(index, stack(2))
    index.write_text('{"weight_map": ')
    assert f"{index} is not JSON" in error_of(index, stack(2))


@pytest.mark.parametrize("entry", ["generator", None])
def test_a_training_checkpoint_gives_the_chosen_entry(tmp_path: Path, entry: str | None) -> None:
    file = tmp_path / "model.pt"
    ema = {name: tensor + 1 for name, tensor in linear_tensors(2).items()}
    torch.save({"generator": linear_tensors(2), "generator_ema": ema, "step": 7}, file)
    module = stack(2)
    load_weights(module, WeightReader(entry).open_set([file]))
    assert module.state_dict()["1.weight"].unique().tolist() == [1.0]
    load_weights(module, WeightReader("generator_ema").open_set([file]))
    assert module.state_dict()["1.weight"].unique().tolist() == [2.0]
    with pytest.raises(CheckpointError, match="no entry 'critic'; use one of generator, generator_ema, step"):
        WeightReader("critic").open_set([file])


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code from the file ran",))


def test_a_pickle_never_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.pt"
    torch.save({"a": Harmful()}, file)
    with pytest.raises(CheckpointError, match="is truncated or contains more than tensors"):
        open_weights(file)
    assert capsys.readouterr().out == ""
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="model.pt"):
        open_weights(file)


@pytest.mark.parametrize("within", [(), ("generator", "model")])
def test_a_written_pickle_is_whole_to_torch_and_to_any_reader_of_zips(tmp_path: Path, within: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {
        "matrix": torch.randn(300, 70, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(7),
        "codes": torch.randint(256, (33,), generator=generator, dtype=torch.uint8),
    }
    save_file(values, tmp_path / "model.safetensors")
    file = tmp_path / "model.pt"
    pickle_file.write_weights(file, open_weights(tmp_path / "model.safetensors"), within=within)
    loaded = torch.load(file, weights_only=True)
    for key in within:
        loaded = loaded[key]
    assert set(loaded) == set(values)
    assert all(loaded[name].dtype == x.dtype and torch.equal(loaded[name], x) for name, x in values.items())
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    content = bytearray(file.read_bytes())
    content[content.index(values["codes"].numpy().tobytes())] ^= 1
    file.write_bytes(content)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is not None


def test_opening_and_checking_read_headers_only(tmp_path: Path) -> None:
    save_weights(tmp_path, "model", linear_tensors(2))
    weights = open_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    check_fits(stack(2), weights)
    assert weights.infos["0.weight"].num_values == 16 and weights.num_bytes == 128


def test_two_names_for_one_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path, "model", linear_tensors(2))
    with pytest.raises(CheckpointError, match="are both names of 'x'"):
        open_weights(tmp_path).renamed(lambda _: "x")
