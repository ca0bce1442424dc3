"""Frames are read at their time in every format, from every start, and shots are put where their frames are."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from longvideo.cli.main import main
from longvideo.data.clips import ClipSpec, plan_clips, read_clip
from longvideo.data.manifest import ShotEntry, TimedShotEntry, VideoEntry, iterate_manifest, read_manifest
from longvideo.data.validation import validate_manifest
from longvideo.data.video import VideoReader, check_complete, probe_video
from longvideo.errors import UserError

from . import clock

CONSTANT = [i / 24 for i in range(150)]
PHONE = [i / 30 for i in range(90)] + [3 + i / 15 for i in range(60)]
"""A phone that halves its rate in the dark, after 3 s."""
OPEN_GOP = {**clock.X264, "x264-params": "b-adapt=0:open-gop=1:b-pyramid=0:threads=1"}
MPEG = {"g": "18", "bf": "2", "qmin": "2", "qmax": "2"}
X265 = {"crf": "8", "preset": "veryfast", "x265-params": "log-level=none:pools=1"}
INTRA = {"qmin": "2", "qmax": "2"}
FORMS = {
    "plain.mp4": {},
    "short_jumps.ts": {},
    "one_jump.ts": {"options": {**clock.X264, "g": "300"}},
    "open.ts": {"options": OPEN_GOP},
    "b.avi": {},
    "mpeg4.avi": {"codec": "mpeg4", "options": MPEG},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": MPEG},
    "h264.vob": {},
    "b.flv": {},
    "b.mkv": {"base": Fraction(1, 1000)},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}},
    "late.mp4": {"begin": 1.5, "sound": 8.0},
    "late.mkv": {"begin": 1.5, "sound": 8.0, "base": Fraction(1, 1000)},
    "a:b %d.mp4": {},
    "fragments.mov": {"container": "mov"},
    "plain.m2ts": {"container": "mpegts"},
    "plain.3gp": {},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "hevc.mkv": {"codec": "libx265", "options": X265, "pixel_format": "yuv420p10le"},
    "open_hevc.ts": {"codec": "libx265", "options": {"x265-params": f"{X265['x265-params']}:open-gop=1:keyint=24"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "crf": "8", "b": "0"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "8", "crf": "4"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": MPEG, "base": Fraction(1, 24)},
    "mpeg1.mpg": {"codec": "mpeg1video", "options": MPEG},
    "mpeg4.mp4": {"codec": "mpeg4", "options": MPEG},
    "mjpeg.avi": {"codec": "mjpeg", "options": INTRA, "pixel_format": "yuvj420p"},
    "mjpeg.mov": {"codec": "mjpeg", "options": INTRA, "pixel_format": "yuvj422p"},
    "prores.mov": {"codec": "prores_ks", "options": {"profile": "3"}, "pixel_format": "yuv422p10le"},
    "alpha.mov": {"codec": "prores_ks", "options": {"profile": "4"}, "pixel_format": "yuva444p10le"},
    "ffv1.mkv": {"codec": "ffv1", "options": {}, "pixel_format": "bgr0"},
    "huffyuv.avi": {"codec": "huffyuv", "options": {}, "pixel_format": "yuv422p"},
    "raw.mkv": {"codec": "rawvideo", "options": {}},
    "rgb.mp4": {"codec": "libx264rgb", "options": {"crf": "4"}, "pixel_format": "rgb24"},
    "full.mp4": {"pixel_format": "yuvj444p"},
    "gray.mp4": {"pixel_format": "gray"},
    "wmv2.wmv": {"codec": "wmv2", "options": INTRA, "base": Fraction(1, 24)},
    "flv1.flv": {"codec": "flv", "options": INTRA, "base": Fraction(1, 24)},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_frame_is_read_at_its_time_and_in_its_colors(name: str, tmp_path: Path) -> None:
    options = dict(FORMS[name])
    if name.endswith((".mkv", ".webm")):
        options["base"] = Fraction(1, 1000)
    if name.endswith((".mpg", ".avi", ".vob")):
        options["base"] = Fraction(1, 24)
    path = clock.write(tmp_path / name, CONSTANT, **options)
    check_complete(path)
    info = probe_video(path)
    assert abs(info.num_frames - 150) <= 1 and info.seconds == pytest.approx(6.25, abs=0.05)
    assert info.fps == pytest.approx(24, rel=1e-3)
    for start in (0.0, 29 / 24, 61 / 24, 125 / 24):
        frames = VideoReader(24).read(path, start_seconds=start)
        assert len(frames) == 150 - round(start * 24)
        assert clock.error(frames, CONSTANT, start_seconds=start) <= 0.006
    for size in ((64, 96), (32, 48)):
        frame = VideoReader(size=size).read(path, max_frames=1)[0].numpy()
        assert np.abs(frame - clock.converted(path, size).astype(int)).max() <= 4


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_cuts_of_a_variable_rate_are_put_where_their_frames_are(suffix: str, tmp_path: Path) -> None:
    # AVI has no times of B-frames, only an empty place for each frame that is missing
    base = Fraction(1, 30 if suffix == "avi" else 1000)
    path = clock.write(tmp_path / f"phone.{suffix}", PHONE, rate=30, base=base, options=clock.X264)
    info = probe_video(path)
    assert info.num_frames == 150 and info.seconds == pytest.approx(7, abs=0.1)
    assert clock.error(VideoReader(24).read(path), PHONE) <= 0.006
    line = {"video": path.name, "fps": info.header_fps, "num_frames": 150}
    in_frames = [{"start": 0, "end": 90, "caption": "light"}, {"start": 90, "end": 150, "caption": "dark"}]
    in_seconds = [{"end_seconds": 3, "caption": "light"}, {"start_seconds": 3.0, "caption": "dark"}]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line | {"shots": shots}) + "\n" for shots in (in_frames, in_seconds)))
    assert validate_manifest(manifest, ClipSpec(5)).problems == ()
    assert validate_manifest(manifest, ClipSpec(5), decode=True).problems == ()
    for reference in plan_clips(read_manifest(manifest), ClipSpec(5)):
        assert reference.captions == ("light", "light", "dark", "dark", "dark")
        assert reference.cuts == (True, False, True, False, False)
        assert clock.error(read_clip(reference, size=(64, 96)).frames, PHONE) <= 0.006


def test_frames_before_a_lossless_cut_do_not_count(tmp_path: Path) -> None:
    whole = clock.write(tmp_path / "whole.mp4", CONSTANT)
    path = clock.cut(whole, tmp_path / "cut.mp4", 0.5)
    info = probe_video(path)
    assert (info.num_frames, info.seconds) == (138, pytest.approx(138 / 24, abs=0.02))
    frames = VideoReader(24).read(path)
    assert clock.shown_times(frames)[[0, -1]] == pytest.approx([0.5, 149 / 24], abs=0.006)
    entry = VideoEntry(path, info.fps, info.num_frames, (ShotEntry(0, info.num_frames, "one"),))
    assert len(plan_clips([entry], ClipSpec(4))) == 1
    counted_by_header = VideoEntry(path, 24, 150, (ShotEntry(0, 150, "one"),))
    with pytest.raises(UserError, match="num_frames is 150, expected 138 as in .*cut.mp4"):
        plan_clips([counted_by_header], ClipSpec(4))


def test_numbers_of_frames_may_be_left_out(tmp_path: Path) -> None:
    path = clock.write(tmp_path / "a.mp4", CONSTANT)
    shots = (TimedShotEntry("one", 0.0, 1.5), TimedShotEntry("two", 1.75))
    (reference,) = plan_clips([VideoEntry(path, None, None, shots)], ClipSpec(4))
    assert reference.captions == ("one", "two", "two", "two")
    with pytest.raises(UserError, match=r"shots\[0\]: end_seconds is 9, expected at most 6.250 as in .*a.mp4"):
        plan_clips([VideoEntry(path, None, None, (TimedShotEntry("one", 0.0, 9.0),))], ClipSpec(1))
    with pytest.raises(UserError, match=r"shots\[0\]: end is 200, expected at most 150"):
        plan_clips([VideoEntry(path, None, None, (ShotEntry(0, 200, "one"),))], ClipSpec(1))


def test_validation_and_planning_give_one_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = clock.write(tmp_path / "a.mp4", CONSTANT)
    shots = [{"start": 0, "end": 140, "caption": "one"}]
    for numbers, is_good in (
        ({"fps": 24, "num_frames": 150}, True),
        ({"fps": 24, "num_frames": 151.0}, True),
        ({"fps": 24, "num_frames": 155}, False),
        ({"fps": 25, "num_frames": 150}, False),
        ({}, True),
    ):
        manifest = tmp_path / "manifest.jsonl"
        manifest.write_text(json.dumps({"video": path.name, "shots": shots} | numbers))
        for flags in ([], ["--frames"]):
            assert main(["data", "validate", str(manifest), *flags]) == (0 if is_good else 2)
        capsys.readouterr()
        if is_good:
            assert len(plan_clips(read_manifest(manifest), ClipSpec(4))) == 1
        else:
            with pytest.raises(UserError, match="expected"):
                plan_clips(read_manifest(manifest), ClipSpec(4))


@pytest.mark.parametrize(("codec", "options"), [("libx264", clock.X264), ("mpeg4", MPEG)])
def test_b_frames_with_times_of_decoding_are_one_problem(codec: str, options: dict[str, str], tmp_path: Path) -> None:
    import av

    whole = clock.write(tmp_path / "whole.mp4", CONSTANT[:60], codec=codec, options=options)
    path = tmp_path / "copied.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        copy = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.pts, packet.stream = packet.dts, copy
                out.mux(packet)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"video": path.name, "shots": [{"caption": "one"}]}))
    (problem,) = validate_manifest(manifest, ClipSpec(1)).problems
    assert "has B-frames with the times at which they are decoded" in problem.why and "encode it again" in problem.why
    with pytest.raises(UserError, match="has B-frames with the times at which they are decoded"):
        plan_clips(read_manifest(manifest), ClipSpec(1))
    assert len(validate_manifest(_manifest_of(whole), ClipSpec(1)).problems) == 0


def test_recordings_that_are_joined_are_one_problem(tmp_path: Path) -> None:
    parts = [clock.write(tmp_path / f"{i}.ts", CONSTANT, begin=20.0 * (1 - i)) for i in range(2)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"video": "joined.ts", "shots": [{"caption": "one"}]}))
    (problem,) = validate_manifest(manifest, ClipSpec(1)).problems
    assert "time goes from" in problem.why and "split the file there" in problem.why


@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "array.json"])
def test_tables_and_arrays_are_manifests(name: str, tmp_path: Path) -> None:
    for i in range(2):
        clock.write(tmp_path / f"{i}.mp4", CONSTANT[:70])
    shots = [("0.mp4", 0, 29, "a man, walking"), ("0.mp4", 29, 70, 'he calls "hi"'), ("1.mp4", 0, 70, "a dog")]
    path = tmp_path / name
    if name == "array.json":
        entries = [
            {"video": "0.mp4", "fps": 24.0, "num_frames": 70.0, "shots": [_shot(*shot) for shot in shots[:2]]},
            {"video": "1.mp4", "fps": 24, "num_frames": 70, "shots": [_shot(*shots[2])]},
        ]
        path.write_text(json.dumps(entries, indent=1))
    else:
        separator = "," if name == "table.csv" else "\t"
        rows = [("video", "fps", "num_frames", "start", "end", "caption")]
        rows += [(video, "24", "70.0", f"{a}.0", str(b), f'"{text.replace(chr(34), 2 * chr(34))}"')
                 for video, a, b, text in shots]  # fmt: skip
        path.write_text("\ufeff" + "\r\n".join(separator.join(row) for row in rows) + "\r\n")
    first, second = read_manifest(path)
    assert first == VideoEntry(
        tmp_path / "0.mp4", 24.0, 70, (ShotEntry(0, 29, "a man, walking"), ShotEntry(29, 70, 'he calls "hi"'))
    )
    assert second.shots == (ShotEntry(0, 70, "a dog"),)
    assert validate_manifest(path, ClipSpec(2)).problems == ()


def test_a_table_of_videos_and_captions_is_enough(tmp_path: Path) -> None:
    clock.write(tmp_path / "12.mp4", CONSTANT[:70])
    (tmp_path / "a.csv").write_text("caption,video\n1984,12.mp4\n")
    (entry,) = read_manifest(tmp_path / "a.csv")
    assert entry == VideoEntry(tmp_path / "12.mp4", None, None, (TimedShotEntry("1984"),))
    assert [reference.captions for reference in plan_clips([entry], ClipSpec(2))] == [("1984", "1984")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "video,text\n", r"a.csv:1: unknown column 'text'; expected video"),
        ("a.csv", "video,fps\n", "a.csv:1: the columns are video, fps, expected at least video and caption"),
        ("a.csv", 'video,caption\n1.mp4,"a\n', "a.csv:2 is not a row of a table: unexpected end of data"),
        ("a.csv", "video,caption,fps\n\n1.mp4,a,x\n", 'a.csv:3: fps is "x", expected a number above 0'),
        ("a.csv", "video,caption\n1.mp4,a,b\n", "a.csv:2: the row at line 2 has 3 cells, expected 2"),
        ("a.csv", "", "lists no video"),
        ("a.json", '[\n{"video": "1.mp4"},\n 3]', r"a.json:2: missing shots; add it"),
        ("a.json", "[\n 3]", r"a.json:2: got 3, expected an object"),
        ("a.json", "[", "a.json is not JSON: Expecting value in column 2"),
        ("a.json", "[]", "lists no video"),
        (
            "a.jsonl",
            '{"video": "1.mp4", "shots": [{"start": 0, "end": 3, "caption": "a"}, {"end_seconds": 4, "caption": "b"}]}',
            "shots have both frames and seconds",
        ),
        (
            "a.jsonl",
            '{"video": "1.mp4", "shots": [{"caption": "a"}, {"start_seconds": 4, "caption": "b"}]}',
            r"shots\[0\]: missing end_seconds; only the last shot",
        ),
        (
            "a.jsonl",
            '{"video": "1.mp4", "shots": [{"start_seconds": 3, "end_seconds": 3, "caption": "b"}]}',
            r"shots\[0\]: end_seconds is 3, expected a number above 3",
        ),
    ],
)
def test_mistakes_in_tables_arrays_and_seconds_are_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "1.mp4").write_bytes(b"")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path / name)
    if message == "lists no video":
        with pytest.raises(UserError, match=message):
            list(iterate_manifest(tmp_path / name))


def _manifest_of(path: Path) -> Path:
    manifest = path.with_name("whole.jsonl")
    manifest.write_text(json.dumps({"video": path.name, "shots": [{"caption": "one"}]}))
    return manifest


def _shot(_video: str, start: int, end: int, caption: str) -> dict[str, object]:
    return {"start": start, "end": end, "caption": caption}


def test_the_first_picture_is_time_zero(tmp_path: Path) -> None:
    path = clock.write(tmp_path / "late.ts", CONSTANT[:60], begin=7.0)
    assert clock.shown_times(VideoReader(24).read(path, max_frames=3)) == pytest.approx(np.arange(3) / 24, abs=0.006)


def test_raw_streams_without_times_are_refused(tmp_path: Path) -> None:
    path = clock.write(tmp_path / "raw.h264", CONSTANT[:30], base=Fraction(1, 24))
    with pytest.raises(UserError, match="raw.h264 is a raw stream without the times of its frames; put it into"):
        probe_video(path)
