"""`longvideo merge`: the merged model of an adapter, and adapters and options that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main


@pytest.mark.parametrize("precision", ["bf16", "nvfp4"])
def test_merge_command(
    distill_folder: Path, distill_run: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = distill_folder / f"merged_{precision}"
    command = ["merge", str(distill_folder / "model"), str(distill_run / "lora"), str(target)]
    command += ["--steps", "2", "--precision", precision]
    if precision == "nvfp4":
        # 24 wide layers do not divide into groups of 16
        assert main(command) == 2
        assert "16" in capsys.readouterr().err and not target.exists()
        return
    assert main(command) == 0
    folder = ModelFolder.open(target)
    assert folder.settings.steps == 2
    for name, tensor in folder.load_transformer().state_dict().items():
        assert torch.equal(tensor, ModelFolder.open(distill_run / "model").load_transformer().state_dict()[name])
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err


def test_fp8_is_not_a_precision_of_a_merged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "tiny", str(tmp_path), str(tmp_path / "merged"), "--precision", "fp8"]) == 2
    assert "precision is 'fp8'; expected one of bf16, nvfp4" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused_before_weights_are_read(
    distill_folder: Path, distill_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read before the error was found")

    monkeypatch.setattr(ModelFolder, "load_transformer", unread)
    # the shipped model has wider layers
    assert main(["merge", "tiny", str(distill_run / "lora"), str(distill_folder / "never")]) == 2
    message = capsys.readouterr().err
    assert ".weight of shape [" in message and "use the model that it was trained on" in message
    assert message.count("\n") == 1
    assert not (distill_folder / "never").exists()
