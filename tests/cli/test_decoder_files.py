"""The small decoder of a model folder goes along with its autoencoder, and `--decoder` is checked before loading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.decoders import choose_decoder, save_decoder
from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main
from longvideo.errors import CheckpointError
from longvideo.vae.tae import TinyDecoder
from tests.checkpoint import small
from tests.decoder_files import SMALL, save, tiny_weights
from tests.infer import small as generating

FILE = "decoder.safetensors"


def with_small(folder: Path) -> Path:
    """Write a model with a small decoder; return its folder."""
    small.save(folder)
    add_decoder(folder, small.VAE.z_dim)
    return folder


def add_decoder(folder: Path, z_dim: int) -> None:
    torch.manual_seed(0)
    decoder = TinyDecoder(replace(SMALL, z_dim=z_dim))
    save_decoder(folder, "decoder", decoder, model="small", dtype=torch.float32)


def same_decoder(folder: Path, other: Path) -> bool:
    stored = choose_decoder(ModelFolder.open(folder), None, device=torch.device("cpu"))
    assert stored is not None and stored.path.parent == folder
    return (folder / FILE).read_bytes() == (other / FILE).read_bytes()


def test_info_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_small(tmp_path / "model")
    assert main(["info", str(model)]) == 0
    assert "small decoder: distilled decoder, decoder.safetensors\n" in capsys.readouterr().out
    assert main(["info", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["small_decoder"] == "distilled decoder"
    (model / FILE).write_bytes((model / FILE).read_bytes()[:-100])
    assert main(["info", str(model)]) == 2
    error = capsys.readouterr().err
    assert "model/decoder.safetensors (" in error and "is truncated" in error
    generating.save(tmp_path / "no_vae", latent_channels=48, has_vae=False)
    assert main(["info", str(tmp_path / "no_vae")]) == 0
    assert (
        "missing: vae; to generate videos, use --base with a model that has it, or --decoder" in capsys.readouterr().out
    )


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    model = with_small(tmp_path / "model")
    (model / FILE).rename(tmp_path / FILE)
    (model / FILE).symlink_to(tmp_path / FILE)
    with pytest.raises(CheckpointError, match="decoder.safetensors"):
        ModelFolder.open(model)


def test_an_export_keeps_it_with_the_autoencoder(tmp_path: Path) -> None:
    folder = ModelFolder.open(with_small(tmp_path / "model"))
    whole, own = tmp_path / "whole", tmp_path / "own"
    ModelFolder.save(whole, settings=folder.settings, transformer=small.transformer(seed=1), other_parts=folder)
    assert same_decoder(whole, folder.path)
    # another autoencoder has other latents
    ModelFolder.save(own, settings=folder.settings, vae=small.vae(seed=1), other_parts=folder)
    assert not (own / FILE).exists()
    # a folder that takes its place keeps it as well
    ModelFolder.save(
        folder.path, settings=folder.settings, transformer=small.transformer(seed=1), other_parts=folder, overwrite=True
    )
    assert same_decoder(folder.path, whole)


def test_a_conversion_keeps_it(tmp_path: Path) -> None:
    model = with_small(tmp_path / "model")
    convert_model(ModelFolder.open(model), tmp_path / "copy", ConversionOptions(target="longvideo"))
    assert same_decoder(tmp_path / "copy", model)
    # diffusers has no place for it
    convert_model(ModelFolder.open(model), tmp_path / "plain", ConversionOptions(target="diffusers"))
    assert not (tmp_path / "plain" / FILE).exists()


def test_packing_keeps_it(tmp_path: Path) -> None:
    generating.save(tmp_path / "model")
    add_decoder(tmp_path / "model", 8)
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "packed")]) == 0
    assert same_decoder(tmp_path / "packed", tmp_path / "model")


def test_a_base_gives_it_with_its_autoencoder(tmp_path: Path) -> None:
    model = with_small(tmp_path / "model")
    alone = tmp_path / "transformer.safetensors"
    convert_model(ModelFolder.open(model), alone, ConversionOptions(target="safetensors"))
    folder = ModelFolder.open(alone, base=model)
    stored = choose_decoder(folder, None, device=torch.device("cpu"))
    assert stored is not None and stored.path == model / FILE
    ModelFolder.save(tmp_path / "joined", settings=folder.settings, other_parts=folder)
    assert same_decoder(tmp_path / "joined", model)


def test_a_merged_model_keeps_it(distill_run: Path, tmp_path: Path) -> None:
    model = with_small(tmp_path / "model")
    assert main(["merge", str(model), str(distill_run / "lora"), str(tmp_path / "merged")]) == 0
    assert same_decoder(tmp_path / "merged", model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--decoder", "x", "--decoder", "wan"), "there are 2 decoders, x, wan; use --decoder once"),
        (("--decoder", "small"), "has no small decoder, which would be decoder.safetensors; use --decoder wan, or a"),
        (("--decoder", "missing.pth"), "decoder is 'missing.pth', which is not a file; expected wan, small or a file"),
        (
            ("--decoder", "taew2_1.pth"),
            "of 16 latent channels (those of Wan2.1, Hunyuan Video and CogVideoX); expected",
        ),
        (("--decoder", "own.pth"), "is TAEW2.2 or lighttae, which differ only in the scale of latents"),
        (("--decoder", "patch.pth"), "is a tiny autoencoder of 48 latent channels (those of Wan2.2); expected the 8"),
        (("--decoder-precision", "foo"), "decoder_precision is 'foo'; expected one of auto, fp32, bf16, fp8"),
        (("--decoder-precision", "fp8", "--decoder", "wan", "--model", "tiny"), "FP8 convolutions need a GPU"),
        (("--decoder-precision", "fp8-emulated"), "whose levels have 8, 16 channels; FP8 needs multiples of 16"),
        (("--decoder", "taew2_2.pth", "--decoder-precision", "fp8"), "the decoder is TAEW2.2, which has no FP8 form"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "serve", "doctor"])
def test_decoders_that_do_not_fit_are_one_line_before_weights_are_read(
    command: str,
    options: tuple[str, ...],
    message: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unread(*_: object, **__: object) -> None:
        raise AssertionError("weights were read before the error was found")

    monkeypatch.setattr(ModelFolder, "load_transformer", unread)
    monkeypatch.setattr(ModelFolder, "load_text_encoder", unread)
    monkeypatch.chdir(tmp_path)
    own = replace(SMALL, z_dim=8)
    save(Path("taew2_1.pth"), tiny_weights(replace(SMALL, z_dim=16, patch_size=1)))
    save(Path("own.pth"), tiny_weights(own))
    save(Path("taew2_2.pth"), tiny_weights(own))
    save(Path("patch.pth"), tiny_weights(replace(SMALL, patch_size=1)))
    own_options = {"generate": ["a red ball", "--device", "cpu"], "serve": ["--port", "0", "--device", "cpu"]}
    arguments = [command, *own_options.get(command, ["--device", "cpu"]), "--model", str(model_folder), *options]
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == 2
    error = capsys.readouterr().err.removeprefix("loading\n")
    assert message in error and error.count("\n") == 1
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "served"] == before
