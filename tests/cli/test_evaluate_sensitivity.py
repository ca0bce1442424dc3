"""`longvideo eval sensitivity` prints tables, writes results and layers to keep, and refuses bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longvideo.cli.main import main
from longvideo.quantization.selection import layers_to_quantize
from tests.quantization.small import model


def test_layers_are_measured_and_the_most_sensitive_are_kept_when_packing(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a red ball\na blue star\n")
    options = ["--prompts", str(prompts), "--num", "1", "--chunks", "2", "--steps", "1", "--budget", "0.1"]
    assert main(["eval", "sensitivity", str(model_folder), "--by", "layers", *options, "-o", str(out)]) == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    record = json.loads((out / "results.json").read_text())
    assert [len(table.splitlines()) for table in tables] == [2 + 2, 2 + 20]
    assert record["prompts"] == ["a red ball"] and record["steps"] == len(record["noise_levels"]) == 1
    singles = [effect for effect in record["effects"] if effect["by"] == "layers"]
    errors = [effect["error"] for effect in sorted(singles, key=lambda effect: -effect["error"])]
    rows = [line.split(" | ") for line in tables[1].splitlines()[2:]]
    assert [row[2] for row in rows] == [f"{error:.1%}" for error in errors]
    kept = (out / "keep.txt").read_text().splitlines()
    assert kept == record["kept"] and set(kept) < {effect["name"] for effect in singles}
    assert 0 < sum(effect["multiply_adds"] for effect in singles if effect["name"] in kept) <= 0.1
    target = tmp_path / "packed"
    assert main(["quantize", str(model_folder), str(target), "--keep-file", str(out / "keep.txt")]) == 0
    assert f"{20 - len(kept)} layers packed" in capsys.readouterr().out
    assert main(["eval", "sensitivity", str(target), *options, "-o", str(tmp_path / "new")]) == 2
    assert "has packed 4-bit weights" in capsys.readouterr().err


def test_kinds_and_blocks_are_the_default(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n")
    options = ["--prompts", str(prompts), "--num", "1", "--chunks", "1", "--steps", "1", "-o", str(out)]
    assert main(["eval", "sensitivity", str(model_folder), *options]) == 0
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [table.splitlines()[0].split(" | ")[2:-2] for table in tables] == [
        ["weights", "inputs", "both", "SQNR"],
        ["weights", "inputs", "both", "SQNR"],
        ["both", "SQNR"],
    ]
    assert [len(table.splitlines()) for table in tables] == [2 + 1, 2 + 10, 2 + 2]
    assert not (out / "keep.txt").exists()


def test_float32_leaves_out_the_roundings_of_the_stored_format(tmp_path: Path, model_folder: Path) -> None:
    prompts, half = tmp_path / "prompts.txt", tmp_path / "bf16"
    prompts.write_text("a red ball\n")
    assert main(["convert", str(model_folder), str(half), "--precision", "bf16"]) == 0
    few = ["--prompts", str(prompts), "--num", "1", "--chunks", "1", "--steps", "1", "--by", "blocks"]
    effects = {}
    for dtype in ("stored", "fp32"):
        out = tmp_path / dtype
        assert main(["eval", "sensitivity", str(half), *few, "--dtype", dtype, "-o", str(out)]) == 0
        record = json.loads((out / "results.json").read_text())
        assert record["dtype"] == dtype
        effects[dtype] = [effect["error"] for effect in record["effects"]]
    # the operands in 4 bits are nearly the same, so both see the same effects up to the roundings of bf16
    assert effects["fp32"] != effects["stored"]
    assert effects["fp32"] == pytest.approx(effects["stored"], rel=0.2)


def test_a_file_of_kept_layers_is_replaced_with_the_results(tmp_path: Path, model_folder: Path) -> None:
    prompts, kept = tmp_path / "prompts.txt", tmp_path / "out" / "keep.txt"
    prompts.write_text("a red ball\n")
    few = ["--prompts", str(prompts), "--num", "1", "--chunks", "1", "--steps", "1", "--operands", "weights"]
    command = ["eval", "sensitivity", str(model_folder), *few, "-o", str(kept.parent)]
    assert main([*command, "--by", "layers", "--budget", "0"]) == 0
    assert kept.read_text() == ""
    assert main([*command, "--by", "blocks"]) == 2
    assert kept.exists()
    assert main([*command, "--by", "blocks", "--overwrite"]) == 0
    assert not kept.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "kind"], "--by is 'kind'; expected one of kinds, blocks, layers"),
        (["--operands", "input"], "--operands is 'input'; expected one of weights, inputs, both"),
        (["--dtype", "fp16"], "--dtype is 'fp16'; expected one of stored, fp32"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompts", "prompts.txt", "--num", "2"], "prompts.txt has 1 prompts; expected at least 2"),
        (["--prompts", "long.txt", "--num", "1"], "tokens; expected at most 32; shorten 'a red ball a red ball"),
        (["--prompts", "shots.jsonl", "--num", "1"], "shots.jsonl:1 is not a prompt alone"),
        ([], "was not trained on ShapeWorld, whose captions are the default; use --prompts FILE"),
        (["-o", "prompts.txt"], "is a file; use a folder"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red ball\n")
    Path("long.txt").write_text("a red ball " * 20)
    Path("shots.jsonl").write_text('{"prompts": ["a red ball", "a blue ball"]}\n')
    assert main(["eval", "sensitivity", str(model_folder), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt", "prompts.txt", "shots.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocks.0.ffn.0\n\nblocks.1.ffn.0\n", "keep.txt:2 is empty"),
        ("head.head\n", "matches no linear layer of the blocks"),
    ],
)
def test_a_keep_file_with_a_bad_line_is_refused(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keep.txt"
    file.write_text(text)
    assert main(["quantize", "tiny", str(tmp_path / "packed"), "--keep-file", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_names_of_layers_are_patterns_of_themselves() -> None:
    names = layers_to_quantize(model())
    assert layers_to_quantize(model(), names[:2]) == names[2:]
