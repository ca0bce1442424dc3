"""Generate through diffusers alone: this file is the custom pipeline that `DiffusionPipeline` loads.

It needs `pip install 'longvideo[diffusers]'`. In a model's repository on the hub the file would be named `pipeline.py`.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from longvideo import VideoWriter
from longvideo.checkpoint.locations import locate
from longvideo.integrations.diffusers import CausalWanPipeline

__all__ = ["CausalWanPipeline"]  # diffusers takes the one pipeline class that it finds in the file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="packaged name, folder in diffusers' layout or Hugging Face id")
    parser.add_argument("--frames", type=int, default=93, help="length of the video, frames")
    parser.add_argument("--steps", type=int, help="solver steps per chunk")
    parser.add_argument("--output", default="community.mp4")
    arguments = parser.parse_args()

    # `locate` returns the folder of a packaged model. diffusers runs a file only with trust_remote_code.
    code = {"custom_pipeline": __file__, "trust_remote_code": True}
    pipe = DiffusionPipeline.from_pretrained(str(locate(arguments.model)), **code)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    options = {"num_inference_steps": arguments.steps, "generator": torch.Generator().manual_seed(0)}
    with VideoWriter(arguments.output, fps=pipe.settings.fps, overwrite=True) as writer:
        for frames in pipe.stream("a large blue star spins above a meadow", num_frames=arguments.frames, **options):
            writer.write((frames[0] * 255).round().astype("uint8"))
            print(f"{arguments.output}: {writer.num_frames} frames")


if __name__ == "__main__":
    main()
