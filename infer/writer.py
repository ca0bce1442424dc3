"""Write frames to a video file that grows and plays while it is made."""

from __future__ import annotations

import os
import tempfile
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from longvideo.errors import UserError

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

CONTAINERS = {".mp4": "mp4", ".mkv": "matroska"}
BT709 = 1  # ISO/IEC 23091-2 code of primaries, transfer and matrix alike

# Short fragments, each begun by whole frames on the disk: a killed process loses less than one of them.
FRAGMENT_MICROSECONDS = 200_000
MUXER_OPTIONS = {
    "mp4": {
        "movflags": "frag_keyframe+empty_moov+default_base_moof",
        "frag_duration": str(FRAGMENT_MICROSECONDS),
        "flush_packets": "1",
    },
    "matroska": {"cluster_time_limit": str(FRAGMENT_MICROSECONDS // 1000), "flush_packets": "1"},
}


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """Return the file that will be written, or raise UserError; nothing on the disk is changed.

    Refused: an unknown suffix, a missing or unwritable folder, and an existing file unless `overwrite`.
    """
    path = Path(path)
    if path.suffix.lower() not in CONTAINERS:
        raise UserError(f"cannot write {path}: the name must end in {' or '.join(CONTAINERS)}")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: {folder} is not a folder; create it first")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another name or pass --overwrite")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.exists():
            with path.open("r+b"):
                pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


class VideoWriter:
    """Append uint8 frames [T, H, W, 3] to an H.264 file; what was appended plays, even if the process is killed.

    The file gets its name when its first frames are in it, so a failure before that leaves an older file untouched.
    Sizes must be even (4:2:0 colour). Lower `crf` means better pictures and larger files.
    """

    def __init__(self, path: str | Path, *, fps: float, overwrite: bool = False, crf: int = 16) -> None:
        self.path = check_output(path, overwrite=overwrite)
        self.num_frames = 0
        self._overwrite = overwrite
        self._fps = Fraction(fps).limit_denominator(1001)
        self._crf = crf
        self._output: _Output | None = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, frames: np.ndarray) -> None:
        """Encode frames [T, H, W, 3] and put them on the disk; raise UserError when the disk refuses them."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise UserError(f"frames are {frames.dtype} {list(frames.shape)}; uint8 [T, H, W, 3] was expected")
        if len(frames) == 0:
            return
        try:
            if self._output is None:
                height, width = frames.shape[1:3]
                self._output = _Output(self.path, width=width, height=height, fps=self._fps, crf=self._crf)
            self._output.append(frames, first_index=self.num_frames)
            if self.num_frames == 0:
                self._output.publish(self.path, overwrite=self._overwrite)
        except OSError as error:
            self._discard()
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.num_frames += len(frames)

    def close(self) -> None:
        """Finish the file. Closing twice does nothing."""
        output, self._output = self._output, None
        if output is None:
            return
        try:
            output.finish()
        except OSError as error:
            raise UserError(f"cannot finish {self.path}: {error.strerror or error}") from error

    def _discard(self) -> None:
        output, self._output = self._output, None
        if output is not None:
            output.discard()


class _Output:
    """An open container under a temporary name beside the final one, until it is published."""

    def __init__(self, path: Path, *, width: int, height: int, fps: Fraction, crf: int) -> None:
        import av

        if width % 2 or height % 2:
            raise UserError(f"frames are {width} x {height}; H.264 with 4:2:0 colour needs an even width and height")
        kind = CONTAINERS[path.suffix.lower()]
        self.temporary: Path | None = path.with_name(f".{path.name}.{os.getpid()}.part")
        self.file: IO[bytes] = self.temporary.open("xb", buffering=0)
        self.container: OutputContainer = av.open(self.file, "w", format=kind, options=MUXER_OPTIONS[kind])
        # No look-ahead and no B-frames: a frame handed in is in the file, not in the encoder.
        options = {"crf": str(crf), "preset": "veryfast", "tune": "zerolatency", "g": str(round(fps))}
        self.stream: VideoStream = self.container.add_stream("libx264", rate=fps, options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        codec: Any = self.stream.codec_context
        codec.thread_count = 1  # threads would slice the frame, which costs bits, and take cores from the model
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = 1  # limited range

    def append(self, frames: np.ndarray, *, first_index: int) -> None:
        import av
        from av.video.reformatter import ColorRange, Colorspace

        for offset, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            picture.pts = first_index + offset
            picture.time_base = 1 / Fraction(self.stream.codec_context.framerate)
            self.container.mux(self.stream.encode(picture))

    def publish(self, path: Path, *, overwrite: bool) -> None:
        assert self.temporary is not None
        if not overwrite:
            path.open("xb").close()  # takes the name, or fails if another has taken it meanwhile
        os.replace(self.temporary, path)
        self.temporary = None

    def finish(self) -> None:
        try:
            self.container.mux(self.stream.encode(None))
        finally:
            self.container.close()
            self._release()

    def discard(self) -> None:
        self._release()

    def _release(self) -> None:
        self.file.close()
        if self.temporary is not None:
            self.temporary.unlink(missing_ok=True)
