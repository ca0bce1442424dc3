"""Scripts cut on chunk boundaries, and training clips are what their plan says."""

import pytest
import torch

from longvideo.errors import UserError
from longvideo.shapeworld.dataset import (
    FPS,
    ScenePool,
    SceneScript,
    SceneShot,
    chunk_start,
    chunks_for,
    render_script,
    sample_script,
)
from longvideo.shapeworld.render import SceneBatch, render
from longvideo.shapeworld.world import Scene, Sprite, is_held_out, sample_scene


def test_chunks_have_29_then_32_frames() -> None:
    assert [chunk_start(chunk) for chunk in range(4)] == [0, 29, 61, 93]
    assert [chunks_for(length) for length in (0.1, 29 / 24, 1.21, 61 / 24, 20)] == [1, 1, 2, 2, 16]


def test_scripts_share_their_chunks_among_the_shots() -> None:
    for seed in range(50):
        script = sample_script(seed, split="heldout", num_shots=3, num_chunks=9)
        assert [script.num_chunks, script.num_frames] == [9, 29 + 8 * 32]
        spans = script.frames()
        assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
        assert all((span.end - 29) % 32 == 0 for span in spans)
        assert all(is_held_out(shot.scene) for shot in script.shots)
        assert script == sample_script(seed, split="heldout", num_shots=3, num_chunks=9)
    with pytest.raises(UserError, match="4 shots do not fit 3 chunks"):
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


def test_training_clips_are_what_their_plan_says() -> None:
    pool = ScenePool.build(30, captions_per_scene=3, first_seed=100)
    generator = torch.Generator().manual_seed(5)
    plan = pool.sample(16, num_chunks=3, generator=generator, cut_probability=0.4, max_start_seconds=2.0)
    again = pool.sample(
        16, num_chunks=3, generator=torch.Generator().manual_seed(5), cut_probability=0.4, max_start_seconds=2.0
    )
    assert torch.equal(plan.caption_BG, again.caption_BG) and torch.equal(plan.start_B, again.start_B)
    assert torch.equal(plan.caption_BG // 3, plan.scene_BG)
    assert plan.cut_BG[:, 0].all() and 5 < plan.cut_BG[:, 1:].sum() < 22
    same = ~plan.cut_BG[:, 1:]
    assert torch.equal(plan.caption_BG[:, 1:][same], plan.caption_BG[:, :-1][same])

    video, mask = pool.render(plan, height=32, width=64)
    assert video.shape == (16, 3, 93, 32, 64) and mask.shape == (16, 1, 93, 32, 64)
    for clip in range(16):
        began, elapsed = 0, plan.start_B[clip].item()
        for chunk in range(3):
            if chunk and plan.cut_BG[clip, chunk]:
                began, elapsed = chunk_start(chunk), 0.0
            frame = chunk_start(chunk) + 11
            scene = pool.scenes[plan.scene_BG[clip, chunk : chunk + 1]]
            direct = render(scene, torch.tensor([[elapsed + (frame - began) / FPS]]), height=32, width=64)
            assert (video[clip, :, frame] - direct[0, :, 0]).abs().max() < 1e-3


def test_pool_captions_belong_to_their_scenes() -> None:
    pool = ScenePool.build(50, captions_per_scene=2, split="heldout", first_seed=7)
    assert len(pool.captions) == 100
    for row, text in enumerate(pool.captions):
        scene = sample_scene(7 + row // 2, split="heldout")
        assert all(sprite.color in text for sprite in scene.sprites)
