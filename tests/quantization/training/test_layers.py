"""Replacement of the layers of a transformer by layers that train in NVFP4."""

from __future__ import annotations

import pytest
import torch

from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.attention import Full
from longvideo.model.layout import TokenLayout
from longvideo.quantization.training.layers import train_in_nvfp4
from longvideo.quantization.training.phase import TrainingPhase
from longvideo.quantization.training.recipe import GradientRounding, TrainingRecipe
from tests.golden import relative_error
from tests.quantization import small


def test_training_layers_take_over_the_parameters() -> None:
    model = small.model()
    exact, parameters = small.velocity(model), dict(model.named_parameters())
    trained = train_in_nvfp4(model, TrainingRecipe(), keep=["blocks.0.*", "blocks.2.*"])
    assert trained.seeds is not None and trained.seeds.values.shape == (10, 2)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert 0 < relative_error(small.velocity(model), exact) < 0.2
    layout, sigma = TokenLayout.block_causal(small.SPEC, 1), torch.full((1, small.SPEC.chunk_frames), 0.5)
    text = model.encode_text(small.features(1))
    flow = model(small.latents(1), sigma, text, rope=model.rope(layout), attention=Full())
    flow.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
    trained.set_phase(TrainingPhase.NEITHER)
    assert relative_error(small.velocity(model), exact) < 1e-6
    trained.set_phase(TrainingPhase.BOTH)
    assert relative_error(small.velocity(model), exact) > 1e-3


def test_a_training_backend_that_cannot_run_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the backend te cannot run on cpu: "):
        train_in_nvfp4(small.model(), TrainingRecipe(), backend="te")
    monkeypatch.setattr("longvideo.kernels.nvfp4.te.unavailable", lambda _device: None)
    with pytest.raises(ValueError, match="one rule, not adaptive and static6"):
        train_in_nvfp4(small.model(), TrainingRecipe(), backend="te")
    recipe = TrainingRecipe(inputs=Rule.STATIC6, gradients=GradientRounding.LUQ)
    with pytest.raises(ValueError, match="TransformerEngine has no gradients=luq; use emulated"):
        train_in_nvfp4(small.model(), recipe, backend="te")


def test_transformer_engine_cannot_round_the_backward_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longvideo.kernels.nvfp4.te.unavailable", lambda _device: None)
    with pytest.raises(ValueError, match="cannot round the backward pass alone; use emulated"):
        train_in_nvfp4(small.model(), TrainingRecipe(), backend="te", backward_alone=True)
