"""The error tables of tiny, measured in one solver step, are within known bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main
from longvideo.evaluation.quantization import ErrorTally, QuantizationReport, as_markdown, measure_quantization
from longvideo.flow.unipc import UniPC


@pytest.fixture(scope="module")
def report() -> QuantizationReport:
    folder = ModelFolder.open("tiny-teacher")
    return measure_quantization(
        folder.load_transformer(),
        folder.load_text_encoder(),
        spec=folder.spec,
        solver=UniPC(1, 5.0),
        prompts=["a red ball"],
    )


def test_adaptive_scales_and_smoothing_lower_the_error(report: QuantizationReport) -> None:
    assert len(report.errors) == 9
    for what, row in report.errors.items():
        assert row["NVFP4 adaptive"] < row["NVFP4 static6"] < row["MXFP4"], what
    smoothed, plain = (report.errors[f"keys before RoPE{end}"]["NVFP4 adaptive"] for end in (", smoothed", ""))
    assert smoothed < 0.6 * plain
    assert abs(report.errors["Gaussian"]["NVFP4 static6"] - 0.095) < 0.001


def test_every_layer_has_an_output_ratio_and_inputs_in_four_bits_cost_more(report: QuantizationReport) -> None:
    weights_only, both = report.sqnr["W4A16"], report.sqnr["W4A4"]
    assert len(both) == 10 and all(len(row) == 8 for row in both.values())
    assert all(sum(both[kind]) < sum(weights_only[kind]) for kind in both)
    assert all(10 < value < 40 for row in both.values() for value in row)


def test_tables_have_a_row_for_everything_measured(report: QuantizationReport) -> None:
    lines = as_markdown(report).splitlines()
    assert len(lines) == 2 + 9 + 1 + 2 + 10
    assert {line.count("|") for line in lines if line} == {4, 6}


def test_a_tally_is_a_ratio_of_energies() -> None:
    tally = ErrorTally()
    tally.add(torch.tensor([1.1, 1.0]), torch.tensor([1.0, 1.0]))
    tally.add(torch.tensor([2.0]), torch.tensor([2.0]))
    assert tally.relative_error == pytest.approx((0.01 / 6) ** 0.5) and tally.decibels == pytest.approx(27.78, abs=0.01)


def test_a_missing_folder_is_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "quantization", "--out", str(tmp_path / "no" / "errors.json")]) == 2
    assert "is not a folder; create it first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
