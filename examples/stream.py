"""Generate a video of several shots and write every chunk to the file as soon as it exists."""

import argparse

from longvideo import Script, ShotRequest, StreamingPipeline, VideoWriter

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="tiny", help="shipped name, model folder or Hugging Face id")
parser.add_argument("--seconds", type=float, default=4.0, help="length of each shot")
parser.add_argument("--steps", type=int, help="solver steps per chunk; more steps are slower and give finer pictures")
parser.add_argument("--output", default="stream.mp4")
arguments = parser.parse_args()

# Weights are loaded once. The GPU is used if there is one; `device="cpu"` forces the CPU.
pipeline = StreamingPipeline.from_pretrained(arguments.model)

# A shot begins after a cut. With cut=False the scene continues and only the prompt changes.
script = Script(
    (
        ShotRequest("a small red circle drifts left over a black background", arguments.seconds),
        ShotRequest("a small red circle drifts right over a black background", arguments.seconds, cut=False),
        ShotRequest("a large blue star spins above a meadow", arguments.seconds),
    )
)

with VideoWriter(arguments.output, fps=pipeline.fps, overwrite=True) as writer:
    # `stream` is a generator of uint8 frames [T, H, W, 3]. The first part has a single frame, which is available
    # before the rest of its chunk is decoded. While the loop below runs, the next chunk is computed.
    for frames in pipeline.stream(script, steps=arguments.steps, seed=0):
        writer.write(frames)
        # Every frame that was written can be played now, even if this process is killed.
        print(f"{arguments.output}: {writer.num_frames} frames")
