"""Errors of a small decoder are counted where they are."""

from __future__ import annotations

import pytest
import torch

from longvideo.train.decoder.report import Comparison, color_outlines, object_regions, picture_regions, table

SQUARE = (..., slice(8, 16), slice(8, 16))


def square() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a video [1, 3, 2, 24, 24] of a white square on black, and the mask of the square."""
    mask = torch.zeros(1, 1, 2, 24, 24)
    mask[SQUARE] = 1
    return 2 * mask.expand(-1, 3, -1, -1, -1) - 1, mask


def test_regions_divide_the_frame_at_the_edge_of_an_object() -> None:
    _, mask = square()
    regions = object_regions(mask)
    sizes = {name: int(region[0, 0, 0].sum()) for name, region in regions.items()}
    assert sizes == {"objects": 4 * 4, "outlines": 12 * 12 - 4 * 4, "background": 24 * 24 - 12 * 12}
    assert torch.equal(sum(regions.values(), torch.zeros(())), torch.ones_like(mask))
    assert object_regions(torch.zeros_like(mask))["outlines"].sum() == 0


def test_edges_of_color_are_the_outline_of_the_object() -> None:
    video, mask = square()
    # a square grows by squares, so that only its corners differ: there both neighbors have one color
    difference = (color_outlines(video) != object_regions(mask)["outlines"]).sum()
    assert difference <= 4 * 2
    regions = picture_regions(video)
    assert regions.keys() == {"outlines", "flat"}
    assert torch.equal(regions["outlines"] + regions["flat"], torch.ones_like(mask))
    assert color_outlines(torch.full_like(video, 0.3)).sum() == 0


def test_equal_videos_have_no_error() -> None:
    video, mask = square()
    comparison = Comparison()
    comparison.add(video, video, object_regions(mask))
    assert comparison.values() == {"psnr": 100.0, "objects": 0.0, "outlines": 0.0, "background": 0.0}


@pytest.mark.parametrize(
    ("row", "column", "region"), [(12, 12, "objects"), (8, 12, "outlines"), (7, 8, "outlines"), (2, 2, "background")]
)
def test_an_error_is_counted_in_its_region(row: int, column: int, region: str) -> None:
    video, mask = square()
    output = video.clone()
    output[:, :, :, row, column] -= torch.sign(video[:, :, :, row, column]) * 0.4
    comparison = Comparison()
    regions = object_regions(mask)
    comparison.add(output, video, regions)
    comparison.add(video, video, regions)
    values = comparison.values()
    count = int(regions[region][0, 0, 0].sum())
    assert values.pop(region) == pytest.approx(0.4 * 127.5 / (2 * count), rel=1e-4)
    # one pixel of 576 differs by 0.4 of 2; the equal clip has 100 dB
    assert values.pop("psnr") == pytest.approx((100 - 10 * torch.tensor(0.04 / 576).log10().item()) / 2, rel=1e-4)
    assert set(values.values()) == {0.0}


def test_values_outside_of_the_range_are_clamped() -> None:
    video, mask = square()
    comparison = Comparison()
    comparison.add(3 * video, video, object_regions(mask))
    assert comparison.values()["psnr"] == 100


def test_the_table_has_a_row_for_each_comparison() -> None:
    lines = table({"a": {"psnr": 30.0, "objects": 1.25}, "bcd": {"psnr": 31.0, "objects": 0.5}}).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["a", "30.000", "1.250"], ["bcd", "31.000", "0.500"]]
    assert lines[0].split()[:2] == ["psnr", "objects"]
