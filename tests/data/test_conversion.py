"""Frames are converted to what a viewer sees: HDR to SDR, interlaced to progressive, turned and mirrored upright."""

import json
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longvideo.cli.main import main
from longvideo.data.tone_mapping import HLG, PQ, hlg_light, pq_light, to_sdr
from longvideo.data.video import VideoReader, probe_video
from longvideo.errors import UserError

from . import clock

TIMES = [i / 24 for i in range(40)]
WHITE, GRAY = {PQ: 0.5807, HLG: 0.75}, {PQ: 0.4109, HLG: 0.3783}
"""Signals of 203 cd/m2 and of 18 % of it: BT.2408-7, table 1, and the inverse of the curves."""


def hdr(path: Path, transfer: str) -> Path:
    """Write frames of HEVC with 10 bits; their left half is reference white and their right half 18 % gray."""
    import av

    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx265", rate=24)
        stream.width, stream.height, stream.pix_fmt = clock.WIDTH, clock.HEIGHT, "yuv420p10le"
        trc = {PQ: "smpte2084", HLG: "arib-std-b67"}[transfer]
        stream.options = {
            "x265-params": f"log-level=none:pools=1:colorprim=bt2020:colormatrix=bt2020nc:transfer={trc}",
            "crf": "5",
        }
        for number in range(40):
            frame: Any = av.VideoFrame(clock.WIDTH, clock.HEIGHT, "yuv420p10le")
            luma = np.full((clock.HEIGHT, clock.WIDTH), 64 + round(876 * GRAY[transfer]), np.uint16)
            luma[:, : clock.WIDTH // 2] = 64 + round(876 * WHITE[transfer])
            for plane, values in enumerate(
                (luma, np.full((32, 48), 512, np.uint16), np.full((32, 48), 512, np.uint16))
            ):
                padded = np.zeros((values.shape[0], frame.planes[plane].line_size // 2), np.uint16)
                padded[:, : values.shape[1]] = values
                frame.planes[plane].update(padded.tobytes())
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def test_curves_have_the_values_of_the_recommendations() -> None:
    # BT.2100-2: PQ reaches 10000 cd/m2; BT.2408-7, table 1: reference white is the signal 0.58 of PQ
    assert pq_light(np.array([0.0, 0.5807, 1.0])) == pytest.approx([0, 203, 10000], rel=2e-3)
    assert hlg_light(np.array([0.0, 0.5, 1.0])) == pytest.approx([0, 1 / 12, 1], rel=1e-4)
    for transfer in (PQ, HLG):
        ramp = np.linspace(0, 65535, 256).astype(np.uint16)[:, None, None].repeat(3, 2)
        gray = to_sdr(ramp, transfer, wide=True)[:, 0]
        assert (np.diff(gray.astype(int), axis=0) >= 0).all() and gray[0].max() == 0 and gray[-1].min() == 255
        assert np.ptp(gray.astype(int), axis=1).max() <= 1
    # a color of BT.2020 with the primaries of BT.709 keeps its hue when it is brighter than white
    bright = to_sdr(np.array([[[65535, 49152, 49152]]], np.uint16), PQ, wide=False)[0, 0]
    assert bright[0] == 255 and bright[1] == bright[2] < 128


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_is_tone_mapped_and_reported(transfer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = hdr(tmp_path / "phone.mp4", transfer)
    assert probe_video(path).transfer == transfer
    frame = VideoReader(24).read(path, max_frames=1)[0].numpy().astype(int)
    white, gray = frame[8:-8, 8:40].reshape(-1, 3), frame[8:-8, 56:-8].reshape(-1, 3)
    assert abs(white - 252).max() <= 2 and abs(gray - 118).max() <= 2
    small = VideoReader(24, size=(32, 48)).read(path, max_frames=1)[0].numpy().astype(int)
    assert abs(small[4:-4, 4:20] - 252).max() <= 2
    (tmp_path / "m.jsonl").write_text(json.dumps({"video": path.name, "shots": [{"caption": "one"}]}))
    assert main(["data", "validate", str(tmp_path / "m.jsonl"), "--chunks", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"1 video is HDR ({transfer}), tone-mapped to SDR"


def combed(count: int) -> list[np.ndarray]:
    """Return frames of a bar that moves 4 pixels between the two fields of a frame."""
    frames = []
    for number in range(count):
        frame = np.full((clock.HEIGHT, clock.WIDTH, 3), 60, np.uint8)
        for field in range(2):
            left = 8 + (2 * number + field) * 4 % 64
            frame[field::2, left : left + 16] = 220
        frames.append(frame)
    return frames


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_interlaced_frames_are_deinterlaced_and_reported(
    codec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import av

    path = tmp_path / "tape.mp4"
    options = {"flags": "+ildct+ilme", "qmin": "2", "qmax": "2", "g": "5"}
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = clock.WIDTH, clock.HEIGHT, "yuv420p"
        stream.options = {"crf": "8", "g": "5", "x264-params": "tff=1:threads=1"} if codec == "libx264" else options
        for picture in combed(40):
            frame: Any = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts = None
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert probe_video(path).is_interlaced
    frames = VideoReader().read(path).numpy().astype(int)
    assert len(frames) == 40

    def comb(pictures: np.ndarray) -> float:
        lines = pictures[:, 1:-1:2, :, 1]
        return float(np.abs(lines - (pictures[:, :-2:2, :, 1] + pictures[:, 2::2, :, 1]) / 2).mean())

    assert comb(np.stack(combed(40)).astype(int)) > 10
    assert comb(frames[2:-2]) < 2
    # the frame of a time does not depend on where reading begins, here at a key frame
    later = VideoReader(25).read(path, start_seconds=1.0).numpy().astype(int)
    assert np.array_equal(later, frames[25:])
    (tmp_path / "m.jsonl").write_text(json.dumps({"video": path.name, "shots": [{"caption": "one"}]}))
    assert main(["data", "validate", str(tmp_path / "m.jsonl"), "--chunks", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 video is interlaced, deinterlaced when read"


ONE = 1 << 16
# a, b, c, d of the display matrix, and the same turn of a numpy array
MATRICES = {
    "upright": ((ONE, 0, 0, ONE), lambda x: x),
    "right": ((0, ONE, -ONE, 0), lambda x: np.rot90(x, -1)),
    "left": ((0, -ONE, ONE, 0), lambda x: np.rot90(x, 1)),
    "upside down": ((-ONE, 0, 0, -ONE), lambda x: np.rot90(x, 2)),
    "mirrored": ((-ONE, 0, 0, ONE), np.fliplr),
    "flipped": ((ONE, 0, 0, -ONE), np.flipud),
    "transposed": ((0, ONE, ONE, 0), lambda x: x.swapaxes(0, 1)),
    "transposed twice": ((0, -ONE, -ONE, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
}


FILTERS = {
    "upright": [],
    "right": [("transpose", "clock")],
    "left": [("transpose", "cclock")],
    "upside down": [("hflip", None), ("vflip", None)],
    "mirrored": [("hflip", None)],
    "flipped": [("vflip", None)],
    "transposed": [("transpose", "cclock_flip")],
    "transposed twice": [("transpose", "clock_flip")],
}
"""FFmpeg's own filters for these turns."""


@pytest.mark.parametrize("name", MATRICES)
def test_pictures_are_turned_and_mirrored_as_the_file_states(name: str, tmp_path: Path) -> None:
    (a, b, c, d), turn = MATRICES[name]
    path = clock.write(tmp_path / "a.mp4", TIMES[20:30])
    plain = VideoReader().read(path, max_frames=1)[0].numpy()
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    turned = turn(plain)
    info = probe_video(path)
    assert (info.height, info.width) == turned.shape[:2]
    assert np.array_equal(VideoReader().read(path, max_frames=1)[0].numpy(), turned)
    size = (48, 32) if turned.shape[0] > turned.shape[1] else (32, 48)
    small = VideoReader(size=size).read(path, max_frames=1)[0].numpy()
    assert small.shape == (*size, 3)
    # turned before it is scaled, as FFmpeg does
    assert np.abs(small - clock.converted(path, size, filters=FILTERS[name]).astype(int)).max() <= 4


def test_a_cover_is_not_the_video(tmp_path: Path) -> None:
    import av
    from av.stream import Disposition

    def write(name: str, *, with_video: bool) -> Path:
        with av.open(str(tmp_path / name), "w") as out:
            cover: Any = out.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 320, 320, "yuvj420p"
            cover.disposition = Disposition.attached_pic
            stream: Any = out.add_stream("libx264" if with_video else "aac", rate=24 if with_video else 8000)
            if with_video:
                stream.width, stream.height, stream.pix_fmt = clock.WIDTH, clock.HEIGHT, "yuv420p"
            out.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((320, 320, 3), 200, np.uint8), format="rgb24")))
            out.mux(cover.encode())
            for seconds in TIMES if with_video else ():
                out.mux(stream.encode(av.VideoFrame.from_ndarray(clock.picture(seconds), format="rgb24")))
            if not with_video:
                silence: Any = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                silence.sample_rate = 8000
                out.mux(stream.encode(silence))
            out.mux(stream.encode())
        return tmp_path / name

    path = write("film.mp4", with_video=True)
    info = probe_video(path)
    assert (info.height, info.width, info.num_frames) == (64, 96, 40)
    assert clock.error(VideoReader(24).read(path), TIMES) <= 0.006
    with pytest.raises(UserError, match=r"song.mp4 has no video stream, only a cover picture; use a video file"):
        probe_video(write("song.mp4", with_video=False))


@pytest.mark.parametrize(
    ("pixel_format", "matrix", "full"),
    [("yuv420p", 1, False), ("yuv420p", 5, False), ("yuv444p", 1, True), ("yuv422p10le", 1, False), ("gray", 1, False)],
)
def test_the_matrix_and_the_range_of_the_file_are_used(
    pixel_format: str, matrix: int, full: bool, tmp_path: Path
) -> None:
    import av
    from av.video.reformatter import ColorRange

    color = np.array([200, 60, 90], np.uint8) if pixel_format != "gray" else np.array([120, 120, 120], np.uint8)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = clock.WIDTH, clock.HEIGHT, pixel_format
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 2 if full else 1
        for _ in range(3):
            frame: Any = av.VideoFrame.from_ndarray(
                np.broadcast_to(color, (clock.HEIGHT, clock.WIDTH, 3)).copy(), "rgb24"
            )
            frame = frame.reformat(
                format=pixel_format,
                dst_colorspace=matrix,
                dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            )
            frame.pts = None
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert np.abs(VideoReader().read(path)[0].numpy().astype(int) - color).max() <= 3


@pytest.mark.parametrize("size", [(64, 96), (48, 72), (96, 144)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv420p10le", "yuv422p10le", "yuv444p10le"])
def test_colors_are_those_of_ffmpegs_own_scaling(pixel_format: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = clock.write(tmp_path / "patches.mp4", TIMES[:1], pixel_format=pixel_format)
    expected = clock.converted(path, size).astype(int)
    assert np.abs(VideoReader(size=size).read(path)[0].numpy() - expected).max() <= 4


def test_pictures_keep_one_size_when_the_file_changes_it(tmp_path: Path) -> None:
    import av

    path = tmp_path / "change.ts"
    with av.open(str(path), "w") as out:
        small: Any = out.add_stream("mpeg2video", rate=24)
        small.width, small.height, small.pix_fmt, small.options = 96, 64, "yuv420p", {"qmax": "2"}
        large: Any = av.CodecContext.create("mpeg2video", "w")
        large.width, large.height, large.pix_fmt, large.options = 192, 128, "yuv420p", {"qmax": "2"}
        large.time_base, large.framerate = Fraction(1, 24), Fraction(24)
        packets = []
        for encoder, number in ((small, 0), (large, 1)):
            for i in range(10):
                pixels = np.full((encoder.height, encoder.width, 3), 40 + 160 * number, np.uint8)
                frame: Any = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = 10 * number + i
                packets += encoder.encode(frame)
            packets += encoder.encode(None)
        for packet in packets:
            packet.stream, packet.time_base = small, Fraction(1, 24)
            out.mux(packet)
    frames = VideoReader(24).read(path)
    assert frames.shape == (20, 64, 96, 3)
    values = frames.float().mean((1, 2, 3)).tolist()
    del values[9]  # FFmpeg's decoder drops the frame before the change
    assert values == pytest.approx([40.0] * 9 + [200.0] * 10, abs=3)
