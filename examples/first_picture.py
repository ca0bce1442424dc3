"""Continue a picture as a video: the picture becomes the first frame, and the prompt describes the motion."""

import argparse

from PIL import Image, ImageDraw

from longvideo import StreamingPipeline, UserError, VideoWriter

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", nargs="?", help="image file; without it a red circle on black is drawn")
parser.add_argument("--prompt", default="a large red circle moves right over a black background")
parser.add_argument("--seconds", type=float, default=4.0)
parser.add_argument("--steps", type=int, help="solver steps per chunk")
parser.add_argument("--output", default="first_picture.mp4")
arguments = parser.parse_args()

picture = arguments.picture
if picture is None:
    picture = Image.new("RGB", (224, 128), "black")
    ImageDraw.Draw(picture).ellipse((30, 34, 90, 94), fill="red")

pipeline = StreamingPipeline.from_pretrained("tiny")
try:
    # `image` is a path, a Pillow image, or uint8 [H, W, 3] from numpy or torch. It is scaled to the size of the model,
    # and its center is cropped. Wrong arguments raise UserError in this line, before anything is generated.
    parts = pipeline.stream(arguments.prompt, seconds=arguments.seconds, steps=arguments.steps, image=picture, seed=0)
except UserError as error:
    parser.error(str(error))

with VideoWriter(arguments.output, fps=pipeline.fps, overwrite=True) as writer:
    for frames in parts:
        writer.write(frames)
print(f"{arguments.output}: {writer.num_frames} frames")
