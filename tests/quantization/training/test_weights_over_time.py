"""Averages, the measure of oscillation and resets follow their definitions over steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longvideo.distributed import Mesh
from longvideo.kernels.nvfp4.averaged import round_toward_average
from longvideo.kernels.nvfp4.format import GROUP, Rule
from longvideo.kernels.nvfp4.reference import dequantize, quantize
from longvideo.quantization.training.oscillation import Paths, update_periods
from longvideo.quantization.training.recipe import TrainingRecipe, WeightsOverTime
from longvideo.quantization.training.weights_over_time import OSCILLATING, WeightHistory

SHAPE = (16, 32)
NAME = "blocks.0.ffn.0.weight"


class Engine:
    """Sets weights and keeps the update periods."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.periods = layer, dict[str, Tensor]()

    def replace(self, name: str, values: Tensor) -> None:
        assert name == NAME
        with torch.no_grad():
            self.layer.weight.copy_(torch.where(values.isnan(), self.layer.weight, values))

    def set_periods(self, name: str, periods: Tensor) -> None:
        self.periods[name] = periods


def new_layer() -> nn.Linear:
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(0.1 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    return layer


def rounding(weight: Tensor) -> Tensor:
    return dequantize(quantize(weight.detach(), Rule.STATIC6, tile_rows=GROUP), torch.float32)


def oscillate(layer: nn.Linear, step: int, places: Tensor, drift: float = 1e-4) -> None:
    """Move some numbers to and fro across the threshold next to them, and the others on in small steps."""
    with torch.no_grad():
        weight = layer.weight
        sign = 1.0 if step % 2 else -1.0
        weight[places] += sign * 4e-3
        weight[~places] += drift


def history(layer: nn.Linear, part: WeightsOverTime, start: int = 0, **settings: Any) -> WeightHistory:
    recipe = TrainingRecipe(weights_over_time=part, **settings)
    return WeightHistory({NAME: layer.get_parameter("weight")}, recipe, mesh=Mesh(), start=start)


def test_paths_are_sums_of_absolute_changes_and_ratios_their_quotients() -> None:
    weights = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1))
    rounded = weights.round()
    weights[:, 0, 0], rounded[:, 0, 0] = 0.3, 0.0
    paths = Paths(torch.Size((3, 5)), torch.device("cpu"))
    for _ in range(2):  # a second measurement starts at zero again
        paths.begin(weights[0], rounded[0])
        for step in range(1, 7):
            paths.add(weights[step], rounded[step])
    path, rounded_path = (x.double().diff(dim=0).abs().sum(0) for x in (weights, rounded))
    assert torch.allclose(paths.states["path"].double(), path)
    assert torch.allclose(paths.states["rounded_path"].double(), rounded_path)
    assert float(paths.ratios()[0, 0]) == 0.0
    assert torch.allclose(paths.ratios().double()[1:], (rounded_path / path)[1:])


def test_update_periods_follow_algorithm_2() -> None:
    ratios = torch.tensor([0.0, 15.9, 16.0, 31.9, 32.0, 1000.0])
    assert update_periods(ratios, unit=16.0, gain=5, most=12).tolist() == [1, 1, 6, 6, 11, 12]


def test_the_share_of_oscillating_weights_is_that_of_the_definition() -> None:
    layer = new_layer()
    follower = history(layer, WeightsOverTime.NONE, start=3, measure_oscillation=True, oscillation_every=8)
    engine, places = Engine(layer), torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.3
    weights, shares = [layer.weight.detach().clone()], []
    for step in range(3 + 2 * 8):
        oscillate(layer, step, places)
        weights.append(layer.weight.detach().clone())
        shares.append(follower.after_step(step, torch.zeros(()), engine)[OSCILLATING].tolist())
    expected = {}
    for last in (3 + 8, 3 + 16):
        rows = torch.stack(weights[last - 8 : last + 1]).double()
        rounded = torch.stack([rounding(weight).double() for weight in weights[last - 8 : last + 1]])
        ratios = rounded.diff(dim=0).abs().sum(0) / rows.diff(dim=0).abs().sum(0)
        expected[last - 1] = int((ratios >= 4.0).sum())
    assert all(count > 0 for count in expected.values())
    assert {step: share[0] for step, share in enumerate(shares) if share[1]} == expected
    assert all(share[1] in (0, layer.weight.numel()) for share in shares)


def test_a_reset_moves_the_oscillating_weights_alone_to_their_rounding() -> None:
    layer = new_layer()
    follower = history(layer, WeightsOverTime.RESET, start=2, oscillation_every=6)
    engine, places = Engine(layer), torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.3
    for step in range(2 + 6):
        oscillate(layer, step, places, drift=0.0)
        before = layer.weight.detach().clone()
        follower.after_step(step, torch.zeros(()), engine)
        changed = layer.weight.detach() != before
        if step < 7:
            assert not changed.any(), step
    assert changed.any()
    assert not (changed & ~places).any()
    assert torch.equal(layer.weight.detach()[changed], rounding(before)[changed])


def test_an_average_follows_the_weights_and_a_skipped_step_leaves_it() -> None:
    layer = new_layer()
    follower = history(layer, WeightsOverTime.Q_EMA, average_decay=0.9)
    average = layer.weight.detach().double().clone()
    for step, skipped in enumerate((0.0, 1.0, 0.0, 0.0)):
        with torch.no_grad():
            layer.weight += 0.01
        assert follower.after_step(step, torch.tensor(skipped), Engine(layer)) == {}
        if not skipped:
            average = 0.9 * average + 0.1 * layer.weight.detach().double()
    assert torch.allclose(follower.averages[NAME].double(), average, atol=1e-6)


def test_update_periods_hold_between_measurements_and_are_1_during_them() -> None:
    layer = new_layer()
    follower = history(
        layer,
        WeightsOverTime.Q_RAMPING,
        oscillation_every=8,
        oscillation_steps=5,
        ramping_unit=2.0,
        ramping_gain=3,
        ramping_most=9,
    )
    engine, places = Engine(layer), torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.3
    largest = []
    for step in range(17):
        oscillate(layer, step, places)
        follower.after_step(step, torch.zeros(()), engine)
        largest.append(int(engine.periods[NAME].max()) if NAME in engine.periods else 0)
    assert largest[:2] == [0, 0]
    assert set(largest[2:7]) == {1}
    assert set(largest[7:10]) == {9}
    assert set(largest[10:15]) == {1}
    assert set(engine.periods[NAME].unique().tolist()) <= {1.0, 4.0, 7.0, 9.0}


@pytest.mark.parametrize("part", [WeightsOverTime.RESET, WeightsOverTime.Q_EMA, WeightsOverTime.Q_RAMPING])
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_stored_states_continue_bit_for_bit(part: WeightsOverTime, stop: int) -> None:
    settings: dict[str, Any] = {"oscillation_every": 4, "oscillation_steps": 3, "measure_oscillation": True}
    whole, second = new_layer(), new_layer()
    places = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.3
    runs = []
    for layer, resumes in ((whole, False), (second, True)):
        follower, engine, metrics = history(layer, part, **settings), Engine(layer), []
        for step in range(12):
            if resumes and step == stop:
                stored = {key: follower.whole(*key.rsplit("/", 1)).clone() for key in follower.shapes()}
                follower = history(layer, part, **settings)
                for key, value in stored.items():
                    name, kind = key.rsplit("/", 1)
                    follower.put(name, kind, value)
            oscillate(layer, step, places)
            metrics.append(follower.after_step(step, torch.zeros(()), engine)[OSCILLATING].tolist())
        states = {key: follower.whole(*key.rsplit("/", 1)) for key in follower.shapes()}
        runs.append((metrics, states))
    assert torch.equal(whole.weight, second.weight)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][key], runs[1][1][key]) for key in runs[0][1])


def test_a_measured_weight_that_rounds_toward_its_average_has_the_path_of_that_rounding() -> None:
    layer = new_layer()
    follower = history(layer, WeightsOverTime.Q_EMA, measure_oscillation=True, oscillation_every=2, average_decay=0.9)
    for step in range(3):
        with torch.no_grad():
            layer.weight += 0.004
        follower.after_step(step, torch.zeros(()), Engine(layer))
    exact = round_toward_average(
        layer.weight.detach(), follower.averages[NAME], Rule.STATIC6, tile_rows=GROUP, dtype=torch.float32
    )
    assert torch.equal(follower.whole(NAME, "last_rounded"), exact.values * exact.tensor_scale)
