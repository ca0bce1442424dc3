"""All problems of a manifest and its videos are reported at once, with line and reason."""

import json
from pathlib import Path

import pytest

from longvideo.cli.main import main
from longvideo.data.clips import ClipSpec
from longvideo.data.manifest import iterate_manifest
from longvideo.data.validation import validate_manifest
from longvideo.data.video import check_complete, count_frames
from longvideo.errors import UserError

from . import footage

SHOT = {"start": 0, "end": 61, "caption": "a red ball"}
GOOD = {"video": "good.mp4", "fps": 24, "num_frames": 61, "shots": [SHOT]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("footage")
    footage.write(out / "good.mp4", 61)
    footage.write(out / "short.mp4", 20)
    footage.write(out / "fast.mp4", 75, fps=30)
    footage.write(out / "damaged.mp4", 125)
    footage.damage(out / "damaged.mp4")
    data = footage.write(out / "cut.mp4", 125).video.read_bytes()
    (out / "cut.mp4").write_bytes(data[: len(data) // 2])
    return out


def manifest(folder: Path, *lines: str | dict) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_every_planted_mistake_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_wrong = [SHOT | {"caption": " "}, {"start": 40, "end": 90, "caption": "late"}]
    lines: list[tuple[str | dict, list[str]]] = [
        (GOOD, []),
        ("{", ["the line is not JSON"]),
        ({"video": "good.mp4", "shots": [{"start": 0, "end": 61}]}, ["missing caption; add it"]),
        ("", []),
        (GOOD | {"video": "absent.mp4"}, ["there is no video"]),
        (
            GOOD | {"shots": two_wrong},
            ["shots[0]: caption is", "shots[1]: end is 90, expected a whole number in 41..61"],
        ),
        (GOOD | {"video": "cut.mp4"}, ["cut.mp4 is"]),
        (
            GOOD | {"num_frames": 65, "fps": 25, "shots": []},
            ["shots is []", "fps is 25, expected 24", "num_frames is 65"],
        ),
        (GOOD | {"video": "short.mp4", "num_frames": 20, "shots": [SHOT | {"end": 20}]}, ["too short: 20 frames"]),
        (GOOD | {"shots": [SHOT | {"end": 10}]}, ["no clip: no 1 chunks in a row"]),
        (GOOD | {"video": "fast.mp4", "fps": 29.99, "num_frames": 76}, []),
    ]
    path = manifest(folder, *(line for line, _ in lines))
    expected = [(number, text) for number, (_, texts) in enumerate(lines, 1) for text in texts]
    report = validate_manifest(path, ClipSpec(1))
    assert [problem.line for problem in report.problems] == [number for number, _ in expected]
    for problem, (_, text) in zip(report.problems, expected, strict=True):
        assert text in problem.why
    assert (report.lines, report.videos, report.shots, report.clips) == (10, 2, 2, 3)
    assert report.seconds == pytest.approx(61 / 24 + 75 / 30)
    assert main(["data", "validate", str(path), "--chunks", "1"]) == 2
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{path}:2: the line is not JSON")
    assert len(out) == len(expected) + 2
    assert out[-2] == f"{len(expected)} problems in 8 of 10 lines"
    assert out[-1] == "2 good videos, 0.001 hours, 2 shots, 3 clips of 1 chunk"


def test_what_is_good_ends_with_code_0_and_counts_clips(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = manifest(folder, GOOD, GOOD)
    assert main(["data", "validate", str(path), "--chunks", "2", "--frames"]) == 0
    assert capsys.readouterr().out == (
        "0 problems in 0 of 2 lines\n2 good videos, 0.001 hours, 2 shots, 2 clips of 2 chunks\n"
    )
    assert main(["data", "validate", str(path), "--chunks", "3"]) == 2
    assert "too short: 61 frames at 24 a second, expected 93 for a clip of 3 chunks" in capsys.readouterr().out


def test_damage_in_the_middle_is_found_by_decoding(folder: Path) -> None:
    path = manifest(folder, GOOD | {"video": "damaged.mp4", "num_frames": 125}, GOOD | {"num_frames": 63})
    (second,) = validate_manifest(path, ClipSpec(1)).problems
    assert (second.line, "num_frames is 63, expected 61" in second.why) == (2, True)
    first, second = validate_manifest(path, ClipSpec(1), decode=True).problems
    assert (first.line, second.line) == (1, 2)
    assert "damaged.mp4 is damaged after" in first.why
    assert "num_frames is 63, expected 61" in second.why


def test_shots_of_a_sample_are_measured_together(folder: Path) -> None:
    part = GOOD | {"sample": "a"}
    short = part | {"video": "short.mp4", "num_frames": 20, "shots": [SHOT | {"end": 20}]}
    report = validate_manifest(manifest(folder, part, part, short), ClipSpec(3))
    (problem,) = report.problems
    assert (problem.line, report.clips) == (3, 1)
    assert problem.why == "too short: 20 frames at 24 a second, expected 32 for one chunk of its sample"
    (problem,) = validate_manifest(manifest(folder, part, part), ClipSpec(4)).problems
    assert (
        "the 2 files of its sample give 93 of their 122 frames at 24 a second as whole chunks, expected 125"
        in problem.why
    )
    problems = validate_manifest(manifest(folder, part, GOOD, "{", part), ClipSpec(1)).problems
    assert [problem.line for problem in problems] == [3, 4]
    assert 'sample "a" continues after other lines, its last one was line 1' in problems[1].why


def test_lines_keep_valid_values_next_to_invalid_ones(folder: Path) -> None:
    (line,) = iterate_manifest(manifest(folder, GOOD | {"fps": "24", "num_frames": 61.5, "shots": [SHOT, SHOT]}))
    assert line.entry is None and line.video == folder / "good.mp4"
    assert (line.fps, line.num_frames) == (None, None)
    assert [problem.split(",")[0] for problem in line.problems] == [
        'fps is "24"',
        "num_frames is 61.5",
        "shots[1]: start is 0",
    ]


def test_a_file_cut_short_is_found_from_its_end(folder: Path, tmp_path: Path) -> None:
    import av

    whole = tmp_path / "first.mp4"
    # a truncated file with its index at the front opens without an error
    with (
        av.open(str(folder / "good.mp4")) as source,
        av.open(str(whole), "w", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    check_complete(whole)
    assert count_frames(whole) == 61
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=r"cut.mp4 is truncated: it ends after \d\.\d\d of 2\.54 s"):
        check_complete(cut)
