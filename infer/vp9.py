"""Encode VP9, the codec of WebM, part by part: every part starts with a key frame."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from longvideo.infer.fragments import BT709, LONGEST_PART, yuv_picture

if TYPE_CHECKING:
    import numpy as np

    from longvideo.infer.fragments import VideoFormat

QUALITY_PER_CRF = Fraction(63, 51)
"""Steps of VP9's scale of quality, 0 to 63, for each step of H.264's, 0 to 51."""


class VP9Encoder:
    """Encodes parts of a video in VP9. No frame waits for the next one."""

    def __init__(self, video_format: VideoFormat) -> None:
        """Open an encoder. The profile of the format is not used."""
        import av

        options = {
            "deadline": "realtime",
            "cpu-used": "6",
            "lag-in-frames": "0",
            "auto-alt-ref": "0",
            "crf": str(round(video_format.crf * QUALITY_PER_CRF)),
            "b": "0",
            "g": str(LONGEST_PART),
        }
        codec: Any = av.CodecContext.create("libvpx-vp9", "w")
        codec.width, codec.height, codec.pix_fmt = video_format.width, video_format.height, "yuv420p"
        codec.framerate, codec.time_base, codec.options = video_format.fps, 1 / video_format.fps, options
        codec.thread_count = 1  # more threads would slow the model down
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = 1  # limited range
        codec.open()
        self._codec = codec
        self._time_base, self._encoded = 1 / video_format.fps, 0

    def encode(self, frames: np.ndarray) -> list[bytes]:
        """Encode a part. frames: uint8 [T, H, W, 3]. Returns a sample for each frame."""
        from av.video.frame import PictureType

        samples = []
        for offset, pixels in enumerate(frames):
            picture = yuv_picture(pixels)
            picture.pts, picture.time_base = self._encoded, self._time_base
            picture.pict_type = PictureType.I if offset == 0 else PictureType.NONE
            packets = self._codec.encode(picture)
            assert len(packets) == 1, "the encoder delayed a frame"
            samples.append(bytes(packets[0]))
            self._encoded += 1
        return samples
