"""Recipes of training in NVFP4: which are refused, and how an operator receives one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longvideo.quantization.training.recipe import HadamardProducts, HadamardSigns, TrainingRecipe
from tests.quantization.training.parts import MS_EDEN, PARTS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hadamard_signs": HadamardSigns.FIXED}, "use hadamard_signs=redrawn, not fixed"),
        ({"hadamard_points": 16}, "use hadamard_points=128, not 16"),
        ({"hadamard_products": HadamardProducts.WGRAD}, "use hadamard_products=both, not wgrad"),
    ],
)
def test_ms_eden_without_its_transform_is_refused(settings: dict[str, HadamardSigns | int], message: str) -> None:
    with pytest.raises(ValueError, match=f"gradients=ms-eden is unbiased only after .*; {message}"):
        replace(MS_EDEN, **settings)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="hadamard_points=32; expected 0 or one of"):
        TrainingRecipe(hadamard_points=32)
    with pytest.raises(ValueError, match=r"outlier_quantile=0.0; expected a share in \(0, 1\]"):
        TrainingRecipe(outlier_quantile=0.0)


@pytest.mark.parametrize("name", PARTS)
def test_a_recipe_is_the_same_after_encoding(name: str) -> None:
    assert TrainingRecipe.decode(PARTS[name].encode()) == PARTS[name]
