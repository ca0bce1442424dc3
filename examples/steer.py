"""Change a video while it is generated: a new prompt, a planned shot, and a return to an earlier chunk."""

import argparse

from longvideo import StreamingPipeline, VideoWriter

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, help="solver steps per chunk")
parser.add_argument("--output", default="steer.mp4")
arguments = parser.parse_args()

pipeline = StreamingPipeline.from_pretrained("tiny")
# Without `seconds` a session has no end. One thread iterates; the other methods may be called from any thread.
session = pipeline.session("a red circle drifts left over a black background", steps=arguments.steps, seed=0)
film = []  # (number of a chunk, frames); the first chunk arrives in two parts


def receive(last: int) -> None:  # take frames from the session until chunk `last` is complete
    for chunk in session:
        film.append((chunk.step.index, chunk.frames[0]))
        if chunk.step.index == last and chunk.is_complete:
            return


with session:
    receive(last=1)
    # Chunks in progress keep their prompt; the receipt states the first chunk that has the new one.
    receipt = session.set_prompt("a blue circle drifts left over a black background", mode="recache")
    session.add_shot("a green star spins over a meadow", chunk=receipt.effective_at + 1, mode="cut")
    receive(last=receipt.effective_at + 1)
    # Generate the last chunk again under another prompt. The chunks before it are kept.
    session.seek(receipt.effective_at + 1, prompt="a yellow square pulses over a meadow", mode="cut")
    film = [(number, frames) for number, frames in film if number <= receipt.effective_at]
    receive(last=receipt.effective_at + 2)

with VideoWriter(arguments.output, fps=pipeline.fps, overwrite=True) as writer:
    for _, frames in film:
        writer.write(frames)
print(f"{arguments.output}: blue from chunk {receipt.effective_at}, {writer.num_frames} frames")
