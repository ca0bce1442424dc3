import logging
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from longvideo.config.loading import Renamed, find_config, load_config, to_yaml
from longvideo.errors import ConfigError


class Kind(Enum):
    SHAPES = "shapes"
    REAL = "real"


@dataclass(frozen=True)
class Stage:
    steps: int
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Recipe:
    name: str = "tiny"
    seed: int = 0
    compile: bool = True
    out: Path = Path("runs")
    mode: Literal["image", "clip"] = "clip"
    kind: Kind = Kind.SHAPES
    limit: int | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    stages: list[Stage] = field(default_factory=list)
    late_stages: tuple[Stage, ...] = ()
    dims: tuple[int, ...] = (1, 2)
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected at least 0")


@dataclass(frozen=True)
class NeedsSteps:
    steps: int
    stage: Stage


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_come_from_the_dataclass_alone() -> None:
    assert load_config(Recipe) == Recipe()


def test_later_files_and_then_overrides_win(tmp_path: Path) -> None:
    first = write(tmp_path, "seed: 1\nname: first\noptimizer: {learning_rate: 1e-5}\n", "first.yaml")
    second = write(tmp_path, "name: second\noptimizer:\n  betas: [0.5, 0.6]\n", "second.yaml")
    recipe = load_config(Recipe, [first, second], ["limit=7", "optimizer.betas=[0.1,0.2]", "out=a/b"])
    assert recipe == Recipe(
        name="second", seed=1, limit=7, out=Path("a/b"), optimizer=Optimizer(learning_rate=1e-5, betas=(0.1, 0.2))
    )


def test_dataclasses_inside_lists_and_tuples_are_built(tmp_path: Path) -> None:
    file = write(
        tmp_path, "stages: [{steps: 3}, {steps: 4, learning_rate: 2}]\nlate_stages: [{steps: 5}]\nweights: {a: 1}\n"
    )
    recipe = load_config(Recipe, [file])
    assert recipe.stages == [Stage(3), Stage(4, 2.0)]
    assert recipe.late_stages == (Stage(5),)
    assert recipe.weights == {"a": 1.0}


def test_an_override_reaches_one_item_of_a_list(tmp_path: Path) -> None:
    file = write(tmp_path, "stages: [{steps: 3}, {steps: 4}]\nlate_stages: [{steps: 5}]\n")
    recipe = load_config(Recipe, [file], ["stages[1].learning_rate=0.5", "late_stages.0.steps=6", "dims[0]=9"])
    assert recipe.stages == [Stage(3), Stage(4, 0.5)]
    assert recipe.late_stages == (Stage(6),)
    assert recipe.dims == (9, 2)


def test_yaml_written_is_read_back_equal(tmp_path: Path) -> None:
    recipe = Recipe(
        out=Path("x/y"),
        kind=Kind.REAL,
        limit=3,
        optimizer=Optimizer(learning_rate=3e-7),
        stages=[Stage(1)],
        late_stages=(Stage(2), Stage(3, 1e-9)),
        weights={"edge": 2.0},
        name="ünïcode: #1",
    )
    assert load_config(Recipe, [write(tmp_path, to_yaml(recipe))]) == recipe


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("sed: 1", "sed", "seed"),
        ("optimizer: {learning_rte: 1}", "optimizer.learning_rte", "optimizer.learning_rate"),
        ("betas: [1, 2]", "betas", "optimizer.betas"),
        ("stages: [{steps: 1}, {step: 3}]", "stages[1].step", "stages[1].steps"),
        ("late_stages: [{step: 3}]", "late_stages[0].step", "late_stages[0].steps"),
    ],
)
def test_an_unknown_key_is_named_with_its_file_and_the_nearest_key(
    tmp_path: Path, text: str, key: str, nearest: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, [file])
    assert str(caught.value) == f"{file}: unknown key '{key}'; nearest is '{nearest}'"


def test_an_unknown_key_far_from_all_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="unknown key 'optimizer.qqq'; valid here: learning_rate, betas"):
        load_config(Recipe, overrides=["optimizer.qqq=3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=abc", "seed is 'abc'; expected int"),
        ("seed=1.5", "seed is 1.5; expected int"),
        ("seed=true", "seed is True; expected int"),
        ("seed=null", "seed is None; expected int"),
        ("limit=x", "limit is 'x'; expected int"),
        ("compile=perhaps", "compile is 'perhaps'; expected bool"),
        ("mode=movie", "mode is 'movie'; expected one of 'image', 'clip'"),
        ("kind=OTHER", "kind is 'OTHER'; expected one of 'shapes', 'real'"),
        ("optimizer=3", "optimizer is 3; expected the keys learning_rate, betas"),
        ("optimizer=null", "optimizer is None; expected the keys learning_rate, betas"),
        ("optimizer.betas=[1,2,3]", "optimizer.betas is [1, 2, 3]; expected tuple[float, float]"),
        ("optimizer.betas=[1,x]", "optimizer.betas[1] is 'x'; expected float"),
        ("dims=[1,x]", "dims[1] is 'x'; expected int"),
        ("dims=3", "dims is 3; expected tuple[int, ...]"),
        ("weights.a=x", "weights.a is 'x'; expected float"),
        ("stages=[{steps: x}]", "stages[0].steps is 'x'; expected int"),
        ("stages=3", "stages is 3; expected list["),
        ("stages[0].steps=3", "stages has 0 items, but no index 0"),
        ("seed", "'seed' is not a setting; write key=value"),
        ("=3", "'=3' is not a setting; write key=value"),
        ("dims=[1", "value of 'dims=[1' is not valid YAML"),
        ("seed=-1", "seed is -1; expected at least 0"),
        ("name=${nowhere}", "Interpolation key 'nowhere' not found"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_wanted(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, overrides=[override])
    assert str(caught.value).startswith(f"command line: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "not valid YAML in line 2"),
        ("seed: [1\n", "not valid YAML in line 2"),
        ("- 1\n- 2\n", "holds a list; expected lines of the form `key: value`"),
        ("\x00", "not valid YAML: .*control characters"),
        ("seed: " + "9" * 5000, "not valid YAML in line 1: a number has 5,000 digits"),
        ("seed: " + "[" * 150, "not valid YAML in line 1: values are nested more than 100 deep"),
        ("7: 1", "the key 7 is not text"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Recipe, [file])
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config(Recipe, [write(tmp_path, "")]) == Recipe()


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file .*absent.yaml"):
        load_config(Recipe, [tmp_path / "absent.yaml"])


def test_values_that_nobody_set_are_listed() -> None:
    with pytest.raises(ConfigError, match="command line: no value for stage.steps, steps"):
        load_config(NeedsSteps, overrides=["stage.learning_rate=1"])
    assert load_config(NeedsSteps, overrides=["stage.steps=1", "steps=2"]) == NeedsSteps(2, Stage(1))


def test_a_key_can_take_the_value_of_another() -> None:
    assert load_config(Recipe, overrides=["seed=4", "limit=${seed}"]).limit == 4


def test_find_config_prefers_a_file_and_names_the_nearest_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longvideo.config.loading.resources.files", lambda _package: tmp_path / "packaged")
    (tmp_path / "packaged" / "tiny").mkdir(parents=True)
    packaged = write(tmp_path / "packaged" / "tiny", "seed: 1\n", "vae.yaml")
    own = write(tmp_path, "seed: 2\n", "own.yaml")
    assert find_config("tiny/vae") == packaged == find_config("tiny/vae.yaml")
    assert find_config(str(own)) == own
    with pytest.raises(ConfigError, match="no configuration 'tiny/vea'.*did you mean 'tiny/vae'"):
        find_config("tiny/vea")
    with pytest.raises(ConfigError, match="packaged: tiny/vae"):
        find_config("qqqqqqqqqqq")


@dataclass(frozen=True)
class Later:
    """A schema in which `inner.size` was `old.big`, and `name` was `old.title`."""

    renamed: ClassVar = {"old.big": Renamed("inner.size", {True: 9}), "old.title": Renamed("name")}

    name: str = "tiny"
    inner: dict[str, int] = field(default_factory=dict)


def test_an_earlier_name_is_read_in_a_file_and_a_message_names_the_present_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, "old: {big: true, title: large}\n")
    with caplog.at_level(logging.INFO):
        config = load_config(Later, [file])
    assert config == Later("large", {"size": 9})
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"{file}: old.big=true is read as inner.size=9; write that",
        f"{file}: old.title=large is read as name=large; write that",
    ]
    with pytest.raises(ConfigError, match=r"old.title is the earlier name of name, which is set too; remove old.title"):
        load_config(Later, [write(tmp_path, "old: {title: large}\nname: small\n")])
    with pytest.raises(ConfigError, match="unknown key 'old'"):
        load_config(Later, overrides=["old.other=1"])
