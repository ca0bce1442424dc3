"""`longvideo quantize`: the packed folder, what is printed, and bad arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longvideo.cli.main import main


def test_quantize_command_packs_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "packed"
    assert main(["quantize", "tiny", str(target), "--keep", "blocks.0.*"]) == 0
    printed = capsys.readouterr().out
    assert "70 layers packed" in printed and "ffn.2: relative error 8." in printed
    assert main(["info", str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (transformer,) = [part for part in report["parts"] if part["name"] == "transformer"]
    assert transformer["problem"] is None and abs(transformer["num_parameters"] - 8.06e6) < 0.01e6
    assert transformer["num_bytes"] < 7 * 2**20
    for arguments, message in (
        (["quantize", "tiny", str(target)], "exists"),
        (["quantize", str(target), str(tmp_path / "twice")], "has packed 4-bit weights"),
        (
            ["quantize", "tiny", str(tmp_path / "x"), "--rule", "adaptiv"],
            "'adaptiv' is not one of 'adaptive'",
        ),
        (["quantize", "tiny", str(tmp_path / "x"), "--keep", "head.*"], "matches no linear layer"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
