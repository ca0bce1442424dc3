"""Generate the same video with 16-bit and 4-bit numbers, and measure how far the pictures are apart."""

import argparse
from typing import Any

import numpy as np

from longvideo import StreamingPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seconds", type=float, default=2.0)
parser.add_argument("--steps", type=int, help="solver steps per chunk")
arguments = parser.parse_args()

# precision: number format of the transformer's weights and of the inputs of its products.
# kv_cache: number format of the keys and values of earlier chunks, which grow with the window.
# Without FP4 units NVFP4 products are emulated: the values are the same, and only memory is saved, not time.
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "4-bit weights": {"precision": "nvfp4-weights"},
    "4-bit weights and inputs": {"precision": "nvfp4"},
    "4-bit weights, inputs and cache": {"precision": "nvfp4", "kv_cache": "nvfp4"},
}


def peak_signal_to_noise(frames: np.ndarray, reference: np.ndarray) -> float:
    """Return the PSNR of uint8 frames in dB; identical frames give infinity."""
    error = np.mean((frames.astype(np.float64) - reference) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


videos = {}
for name, formats in FORMATS.items():
    pipeline = StreamingPipeline.from_pretrained("tiny", **formats)
    parts = pipeline.stream("a blue star spins over a meadow", seconds=arguments.seconds, steps=arguments.steps, seed=0)
    videos[name] = np.concatenate(list(parts))
    print(f"{name}: {peak_signal_to_noise(videos[name], videos['bf16']):.1f} dB")
