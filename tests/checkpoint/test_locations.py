"""Names of models: packaged models, paths, the hub; links out of a model's folder; parts in another model's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.locations import locate
from longvideo.checkpoint.settings import ModelSettings
from longvideo.cli.main import main
from longvideo.errors import CheckpointError, UserError
from tests.checkpoint import small
from tests.checkpoint.random_weights import fingerprints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return small.save(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def copy(saved: ModelFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved.path, tmp_path / "copy"))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Replace the download from the hub; return the list of requested ids."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    requests: list[str] = []

    def download(hub_id: str, **_: object) -> str:
        requests.append(hub_id)
        if hub_id.startswith("some/"):
            return str(tmp_path)
        raise LocalEntryNotFoundError("cannot reach the hub\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return requests


def test_names_that_mean_nothing_get_a_hint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean 'tiny'"):
        locate("tinny")
    with pytest.raises(CheckpointError, match="use tiny, tiny-teacher"):
        locate("gigantic")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a weight file; expected a model folder"):
        locate(tmp_path / "file")
    with pytest.raises(CheckpointError, match="no model "):
        locate(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be a path: File name too long$"):
        locate("x" * 5000)
    with pytest.raises(CheckpointError, match=r"there is no .*model_index.json, and no weights"):
        ModelFolder.open(tmp_path)


def test_a_hub_id_is_downloaded_and_its_failure_is_one_line(requests: list[str], tmp_path: Path) -> None:
    assert locate("some/model") == tmp_path and locate("hf:some/model") == tmp_path
    with pytest.raises(CheckpointError, match="downloading it from the Hugging Face hub failed: cannot reach the hub;"):
        locate("other/model")
    assert requests == ["some/model", "some/model", "other/model"]


@pytest.mark.parametrize(
    "name",
    [
        *("runs/model", "models/wan", "checkpoints/step_0000100", "weights/a", "here/model", "link/model"),
        *("Runs/model", "run/model", "ckpt/step_1"),
        *("./some/model", "../some/model", "/some/model", "some/model/", "some/model/more", "some/model.safetensors"),
        Path("some/model"),
    ],
)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name: str | Path, requests: list[str], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"^there is no (model|folder or file) '"):
        locate(name)
    assert requests == []


def test_info_of_a_run_that_is_not_there_is_one_line(requests: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "runs/model"]) == 2
    assert capsys.readouterr().err == (
        "error: there is no folder or file 'runs/model'; for a model on the Hugging Face hub use hf:runs/model\n"
    )
    assert main(["info", "hf:runs"]) == 2
    assert "use hf:org/name" in capsys.readouterr().err
    assert main(["info", "hf:runs/model"]) == 2
    assert "downloading it from the Hugging Face hub failed" in capsys.readouterr().err and requests == ["runs/model"]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "tokenizer/spiece.model",
            "tokenizer/tokenizer.json",
            "vae/config.json",
            "longvideo.json",
            "model_index.json",
        ),
        *("transformer/diffusion_pytorch_model.safetensors", "vae", "tokenizer", "text_encoder"),
    ],
)
def test_a_link_that_leaves_the_folder_is_not_followed(
    name: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret"
    if (copy / name).exists():
        shutil.move(copy / name, secret)
    else:
        secret.write_text("a secret")
    (copy / name).symlink_to(secret)
    for command in (["convert", str(copy), str(tmp_path / "result")], ["info", str(copy)]):
        assert main(command) == 2
        assert capsys.readouterr().err == (
            f"error: {copy / name} is a link to {secret}, outside of the model's folder, and is not followed;"
            " replace it by a copy\n"
        )
    assert not (tmp_path / "result").exists()


def test_links_of_single_files_and_adapters_that_leave_are_not_followed(tmp_path: Path) -> None:
    official = tmp_path / "loose"
    official.mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "elsewhere.pt")
    (official / "model.pt").symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt is a link to .*elsewhere\.pt"):
        ModelFolder.open(official)
    (official / "model.pt").unlink()
    (official / "adapter_config.json").symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is a link"):
        ModelFolder.open(official)


def test_links_within_a_folder_to_a_folder_and_of_the_hubs_cache_are_followed(
    saved: ModelFolder, copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(copy)
    (copy / "vae" / "real.safetensors").hardlink_to(copy / "vae" / "diffusion_pytorch_model.safetensors")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "vae" / "diffusion_pytorch_model.safetensors").symlink_to("real.safetensors")
    assert fingerprints(ModelFolder.open(tmp_path / "link")) == fingerprints(saved)
    snapshot, blobs = (tmp_path / "models--org--name" / name for name in ("snapshots/0123", "blobs"))
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in saved.path.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(saved.path)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blobs / str(number))
        link.symlink_to(Path(*[".."] * len(link.relative_to(snapshot).parts), "..", "blobs", str(number)))
    assert fingerprints(ModelFolder.open(snapshot)) == fingerprints(saved)
    assert ModelFolder.open(snapshot).load_text_encoder()
    (blobs / "0").unlink()
    (blobs / "0").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link to /etc/passwd"):
        ModelFolder.open(snapshot)


@pytest.fixture
def borrower(copy: Path) -> Path:
    """A folder with its own transformer, whose other parts are in the folder next to it."""
    path = copy.parent / "borrower"
    ModelFolder.save(path, settings=small.SETTINGS, transformer=small.transformer(seed=3))
    name_parts(path, {"vae": "copy", "text_encoder": "copy"})
    return path


def name_parts(folder: Path, parts: object) -> None:
    file = folder / "longvideo.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "parts": parts}))


def test_parts_in_another_folder_are_read_from_there_and_written_whole(
    saved: ModelFolder, borrower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelFolder.open(borrower)
    assert model.parts == saved.parts and model.settings == small.SETTINGS and type(model.settings) is ModelSettings
    own, other = fingerprints(model), fingerprints(saved)
    assert {name for name, digest in own.items() if digest != other[name]} == {
        name for name in own if name.startswith("transformer")
    }
    assert main(["info", str(borrower), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"]["vae"] == f"from {borrower.parent / 'copy'}"
    convert_model(model, tmp_path / "whole", ConversionOptions())
    shutil.rmtree(borrower.parent / "copy")
    whole = ModelFolder.open(tmp_path / "whole")
    assert fingerprints(whole) == own and whole.load_text_encoder().encode(["a red ball"])
    assert "parts" not in json.loads((tmp_path / "whole" / "longvideo.json").read_text())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"vae": "../copy"}, "takes vae from '../copy'; expected tiny, tiny-teacher or the name of a folder next to"),
        ({"vae": "/etc"}, "takes vae from '/etc'; expected"),
        ({"vae": ".."}, "takes vae from '..'; expected"),
        ({"vae": "org/name"}, "takes vae from 'org/name'; expected"),
        ({"vae": "borrower"}, "is not another model"),
        ({"vae": "absent"}, "is not another model"),
        ({"vae": "away"}, "away is a link to "),
        ({"vae": "second"}, "second does not store its own vae"),
        ({"scheduler": "copy"}, "has 'scheduler' in parts; expected one of transformer, vae, text_encoder"),
        ({"transformer": "copy"}, "takes transformer from another folder, but model_index.json lists it too"),
        ({"vae": 3.5}, "takes vae from '3.5', but .* is not another model"),
        ([["vae", "copy"]], "parts"),
    ],
)
def test_parts_that_are_not_allowed_are_refused(parts: object, message: str, borrower: Path, tmp_path: Path) -> None:
    shutil.copytree(borrower, borrower.parent / "second")
    far = tmp_path.parent / f"{tmp_path.name}_far"
    shutil.copytree(borrower.parent / "copy", far)
    (borrower.parent / "away").symlink_to(far)
    name_parts(borrower, parts)
    with pytest.raises(UserError, match=message) as caught:
        ModelFolder.open(borrower)
    assert "\n" not in str(caught.value)
