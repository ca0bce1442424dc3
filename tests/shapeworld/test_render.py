"""Pictures are exact functions of scene and time, and sprites perform their motions."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from longvideo.shapeworld.render import SceneBatch, foreground_mask, render, render_backgrounds, render_with_mask
from longvideo.shapeworld.world import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    SIZES,
    TRAVELING,
    Edge,
    Scene,
    Sprite,
    sample_scene,
)

FRAME_SECONDS = 1 / 24


def one(motion: str, *, edge: Edge = "bounce", shape: str = "square", size: str = "small", seed: int = 0) -> Scene:
    return Scene((Sprite(shape, "red", size, motion, edge),), "black", seed)


def masks(scene: Scene, times: Tensor, **size: int) -> Tensor:
    """Return the foreground masks [T, H, W] of one scene."""
    return foreground_mask(SceneBatch.from_scenes([scene]), times[None], **size)[0, 0]


def centers(mask_THW: Tensor) -> tuple[Tensor, Tensor]:
    _, height, width = mask_THW.shape
    area = mask_THW.sum((1, 2))
    x = (mask_THW.sum(1) * (torch.arange(width) + 0.5)).sum(1) / area
    y = (mask_THW.sum(2) * (torch.arange(height) + 0.5)).sum(1) / area
    return x, y


def seconds(length: float, step: float = FRAME_SECONDS) -> Tensor:
    return torch.arange(0, length, step)


def test_a_frame_by_itself_equals_the_frame_of_a_clip() -> None:
    batch = SceneBatch.from_scenes([sample_scene(seed, split="train") for seed in range(6)])
    times = seconds(29 * FRAME_SECONDS).expand(6, -1)
    clip = render(batch, times)
    for frame in (0, 1, 17, 28):
        assert torch.equal(render(batch, times[:, frame : frame + 1])[:, :, 0], clip[:, :, frame])
    for scene in (0, 2, 5):
        alone = render(batch[torch.tensor([scene])], times[scene : scene + 1])
        assert torch.equal(alone[0], clip[scene])


def test_scenes_may_be_indexed_in_any_order() -> None:
    scenes = [sample_scene(seed, split="train") for seed in range(20)]
    index = torch.tensor([7, 3, 3, 19])
    picked = SceneBatch.from_scenes(scenes)[index]
    times = torch.rand(4, 2, generator=torch.Generator().manual_seed(0)) * 100
    built = SceneBatch.from_scenes([scenes[i] for i in index.tolist()])
    assert len(picked) == 4
    assert torch.equal(render(picked, times), render(built, times))


def test_video_and_mask_have_the_promised_form() -> None:
    batch = SceneBatch.from_scenes([sample_scene(seed, split="train") for seed in range(6)])
    video, mask = render_with_mask(batch, torch.zeros(6, 3), height=64, width=112)
    assert video.shape == (6, 3, 3, 64, 112)
    assert mask.shape == (6, 1, 3, 64, 112)
    assert video.min() >= -1 and video.max() <= 1
    assert mask.min() == 0 and mask.max() == 1


def test_pixels_are_background_where_the_mask_is_0_and_the_sprite_where_it_is_1() -> None:
    scene = Scene((Sprite("star", "cyan", "large", "spinning"),), "night", 4)
    video, mask = render_with_mask(SceneBatch.from_scenes([scene]), torch.tensor([[0.7]]))
    inside, outside = mask[0, 0, 0] == 1, mask[0, 0, 0] == 0
    color = torch.tensor(COLORS["cyan"]) / 127.5 - 1
    assert torch.allclose(video[0, :, 0][:, inside], color[:, None], atol=1e-6)
    night = render_backgrounds(128, 224)[BACKGROUNDS.index("night")]
    assert torch.equal(video[0, :, 0][:, outside], night[:, outside])


@pytest.mark.parametrize("shape", SHAPES)
def test_areas_are_those_of_the_shapes(shape: str) -> None:
    star_area = 5 * 1.26 * 0.6 * math.sin(math.pi / 5)
    expected = {
        "circle": math.pi,
        "square": 4 * 0.88**2,
        "triangle": 3 * math.sqrt(3) / 4 * 1.3**2,
        "star": star_area,
        "cross": 8 * 1.1 * 0.4 - 4 * 0.4**2,
        "ring": math.pi * (1.06**2 - 0.58**2),
    }
    for size, radius in SIZES.items():
        area = masks(one("still", shape=shape, size=size), torch.zeros(1)).sum().item()
        assert area == pytest.approx(expected[shape] * radius**2, rel=0.03)


def test_rendering_scales_with_the_height() -> None:
    batch = SceneBatch.from_scenes([sample_scene(seed, split="train") for seed in range(10)])
    times = torch.full((10, 1), 1.3)
    small = render(batch, times, height=64, width=112)[:, :, 0]
    large = torch.nn.functional.avg_pool2d(render(batch, times, height=256, width=448)[:, :, 0], 4)
    assert (small - large).abs().mean() < 0.003


def test_a_wrapped_sprite_is_never_lost_and_never_jumps() -> None:
    for motion in TRAVELING:
        scene = one(motion, edge="wrap", shape="circle")
        mask = masks(scene, seconds(7))
        area = mask.sum((1, 2))
        assert area.min() > 0.98 * area.max(), motion
        # a step of at most 2 pixels changes only a thin crescent, also across the border
        change = (mask[1:] - mask[:-1]).abs().sum((1, 2))
        assert change.max() < 2.8 * 2 * SIZES["small"] * 2, motion


def test_wrapping_crosses_the_seam() -> None:
    mask = masks(one("right", edge="wrap"), seconds(8))
    both_sides = (mask[:, :, 0].sum(1) > 0) & (mask[:, :, -1].sum(1) > 0)
    assert both_sides.any()


def test_a_bouncing_sprite_stays_inside_and_shows_its_direction_first() -> None:
    signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for (motion, (sign_x, sign_y)), size, seed in itertools.product(signs.items(), SIZES, range(2)):
        mask = masks(one(motion, size=size, seed=seed), seconds(6))
        area = mask.sum((1, 2))
        assert area.min() > 0.985 * area.max()
        x, y = centers(mask)
        along, sign, across = (x, sign_x, y) if sign_x else (y, sign_y, x)
        steps = (along[1:] - along[:-1]) * sign
        first_bounce = int((steps < 0).nonzero()[0])
        assert first_bounce >= int(1.5 * 24) - 1
        assert steps[: first_bounce - 1].min() > 0.8
        assert steps.abs().max() < 45 / 24 + 0.1
        assert across.std() < 0.05


def test_the_speed_is_in_its_range() -> None:
    for seed in range(10):
        x, _ = centers(masks(one("right", seed=seed), seconds(1.4)))
        speed = (x[-1] - x[0]).item() / (FRAME_SECONDS * (len(x) - 1))
        assert 34.5 < speed < 45.5


def test_circling_has_its_direction() -> None:
    for motion, sign in (("clockwise", 1), ("counterclockwise", -1)):
        for seed in range(2):
            x, y = centers(masks(one(motion, seed=seed), seconds(8)))
            x, y = x - (x.max() + x.min()) / 2, y - (y.max() + y.min()) / 2
            radius = torch.hypot(x, y)
            assert radius.min() > 0.97 * radius.max() > 23
            # y points down: a positive cross product is clockwise on the screen
            cross = x[:-1] * y[1:] - y[:-1] * x[1:]
            assert (cross * sign).min() > 0
            turn = torch.asin((cross / (radius[:-1] * radius[1:])).clamp(-1, 1)).abs().sum() / (2 * math.pi)
            assert 8 / 4 - 0.1 < turn < 8 / 2.5 + 0.1


def test_circling_begins_near_the_top_and_goes_its_own_way_first() -> None:
    for motion, sign in (("clockwise", 1), ("counterclockwise", -1)):
        for seed in range(8):
            x, y = centers(masks(one(motion, seed=seed), seconds(8)))
            height = (y.max() - y[0]) / (y.max() - y.min())
            assert height > (1 + math.cos(2 * math.pi / 8)) / 2 - 0.02
            sideways = (x - x[0]) * sign / ((x.max() - x.min()) / 2)
            assert sideways[:10].min() > -0.02  # a quarter of a second: at the slowest 23 of 45 degrees
            assert sideways[:25].max() > 0.25  # at the least from 45 degrees to 90


def test_spinning_changes_the_outline_and_nothing_else() -> None:
    for shape in ("square", "triangle", "star", "cross"):
        mask = masks(one("spinning", shape=shape, size="large"), seconds(4))
        x, y = centers(mask)
        assert x.std() < 0.1 and y.std() < 0.1
        assert mask.sum((1, 2)).std() < 0.01 * mask.sum((1, 2)).mean()
        assert (mask[0] - mask[10]).abs().sum() > 0.1 * mask[0].sum()


def test_pulsing_changes_the_size_in_place() -> None:
    mask = masks(one("pulsing"), seconds(4.1))
    x, y = centers(mask)
    area = mask.sum((1, 2))
    assert x.std() < 0.05 and y.std() < 0.05
    assert area.max() / area.min() == pytest.approx((1.28 / 0.72) ** 2, rel=0.05)


def test_still_sprites_do_not_move() -> None:
    mask = masks(one("still", shape="star"), seconds(3))
    assert torch.equal(mask[0].expand_as(mask), mask)


def test_zigzag_drifts_sideways_and_swings() -> None:
    for seed in range(4):
        x, y = centers(masks(one("zigzag", seed=seed), seconds(8)))
        assert 38 < y.max() - y.min() < 54
        vertical = torch.sign(y[1:] - y[:-1])
        turns = int((vertical[1:] != vertical[:-1]).sum())
        assert 3 <= turns <= 14
        assert (x[1:31] - x[:30]).sign().unique().numel() == 1


def test_two_sprites_keep_to_their_halves() -> None:
    scenes = [sample_scene(seed, split="train", num_sprites=2) for seed in range(60)]
    times = torch.arange(12).expand(60, -1) * 0.53
    video, mask = render_with_mask(SceneBatch.from_scenes(scenes), times)
    assert mask[..., 111:113].max() == 0
    left_first = 0
    for scene, clip, covered in zip(scenes, video, mask, strict=True):
        halves = []
        for half in (slice(0, 112), slice(112, 224)):
            pixels = clip[..., half][:, covered[0, ..., half] == 1]
            assert torch.equal(pixels, pixels[:, :1].expand_as(pixels))
            halves.append(((pixels[:, 0] + 1) * 127.5).round().int().tolist())
        assert sorted(halves) == sorted([list(COLORS[sprite.color]) for sprite in scene.sprites])
        left_first += halves[0] == list(COLORS[scene.sprites[0].color])
    assert 20 < left_first < 40


def test_an_hour_later_is_as_exact_as_the_start() -> None:
    batch = SceneBatch.from_scenes([one("clockwise"), one("pulsing"), one("spinning")])
    period = batch.period_BN.double()
    early = torch.tensor([[0.5]], dtype=torch.float64).expand(3, 1)
    late = early + period * torch.floor(3600 / period)
    assert (render(batch, early) - render(batch, late)).abs().max() < 1e-3


def test_rendering_compiles_as_one_graph() -> None:
    batch = SceneBatch.from_scenes([sample_scene(seed, split="train") for seed in range(4)])
    times = torch.rand(4, 3)
    compiled = torch.compile(render_with_mask, backend="eager", fullgraph=True)
    assert torch.equal(compiled(batch, times, height=32, width=64)[0], render(batch, times, height=32, width=64))


def lab(rgb: Tensor) -> Tensor:
    """Return CIELAB of 8-bit sRGB (CIE 15, D65), channels last."""
    linear = (rgb / 255).double()
    linear = torch.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).double()
    xyz = linear @ matrix.T / torch.tensor([0.9505, 1.0, 1.089]).double()
    root = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lightness = 116 * root[..., 1] - 16
    return torch.stack([lightness, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])], -1)


def test_colors_are_far_apart_and_far_from_every_background() -> None:
    colors = lab(torch.tensor(list(COLORS.values())))
    apart = torch.cdist(colors, colors) + 1e3 * torch.eye(len(colors))
    assert apart.min() > 30
    pictures = (render_backgrounds(64, 112) + 1) * 127.5
    for name, picture in zip(BACKGROUNDS, pictures, strict=True):
        distance = torch.cdist(colors, lab(picture.flatten(1).T))
        assert distance.min() > 40, name


def test_every_motion_is_drawn() -> None:
    scenes = [one(motion) for motion in MOTIONS]
    assert foreground_mask(SceneBatch.from_scenes(scenes), torch.ones(len(scenes), 1)).sum((1, 2, 3, 4)).min() > 100
