"""The measurement of encoding: parts that are equal to the whole, and the time that ranks save."""

from __future__ import annotations

import torch

from longvideo.infer.bench.encoding import time_encoding
from longvideo.vae.config import AutoencoderConfig


def test_parts_make_up_the_whole() -> None:
    config = AutoencoderConfig.tiny()
    timing = time_encoding(config, latents=48, ranks=2, size=(32, 32), device=torch.device("cpu"), dtype=torch.float32)
    assert timing.halo == 20 and timing.relative_error < 1e-5
    # latents 24 to 47, 20 latents before them, and one frame before those, which the encoder takes as the first
    assert timing.part_frames == [4 * 23 + 1, 4 * 44 + 1]
    assert timing.saved_seconds == timing.whole_seconds - max(timing.part_seconds)
