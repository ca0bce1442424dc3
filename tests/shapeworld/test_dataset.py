"""Scripts have cuts on chunk boundaries, and training clips match their plan."""

import pytest
import torch

from longvideo.errors import UserError
from longvideo.shapeworld.dataset import (
    FPS,
    SceneScript,
    SceneShot,
    render_script,
    sample_script,
)
from longvideo.shapeworld.render import SceneBatch, render
from longvideo.shapeworld.world import Scene, Sprite, is_held_out


def test_scripts_share_their_chunks_among_the_shots() -> None:
    for seed in range(50):
        script = sample_script(seed, split="heldout", num_shots=3, num_chunks=9)
        assert [script.num_chunks, script.num_frames] == [9, 29 + 8 * 32]
        spans = script.frames()
        assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
        assert all((span.end - 29) % 32 == 0 for span in spans)
        assert all(is_held_out(shot.scene) for shot in script.shots)
        assert script == sample_script(seed, split="heldout", num_shots=3, num_chunks=9)
    with pytest.raises(UserError, match="4 shots do not fit into 3 chunks"):
        sample_script(0, split="train", num_shots=4, num_chunks=3)


def test_a_shot_starts_its_scene_at_the_cut() -> None:
    script = sample_script(1, split="train", num_shots=2, num_chunks=4)
    chunks = list(render_script(script, height=64, width=112))
    assert [len(chunk) for chunk in chunks] == [29, 32, 32, 32]
    video = torch.cat(chunks)
    span = script.frames()[1]
    batch = SceneBatch.from_scenes([script.shots[1].scene])
    direct = render(batch, torch.tensor([[0.0, 5 / FPS]], dtype=torch.float64), height=64, width=112)[0]
    expected = ((direct + 1) * 127.5).round().byte().permute(1, 2, 3, 0)
    assert torch.equal(video[span.start], expected[0])
    assert torch.equal(video[span.start + 5], expected[1])


def test_without_a_cut_the_clock_runs_on() -> None:
    scene = Scene((Sprite("circle", "red", "small", "clockwise"),), "gray", 3)
    split = SceneScript((SceneShot(scene, "one", 1), SceneShot(scene, "two", 2, cut=False)))
    whole = SceneScript((SceneShot(scene, "one", 3),))
    frames = [torch.cat(list(render_script(script, height=32, width=64))) for script in (split, whole)]
    assert torch.equal(frames[0], frames[1])
