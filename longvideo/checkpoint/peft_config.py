"""The configuration of peft (`adapter_config.json`, or a header of diffusers): the scale of each layer's update."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from longvideo.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

# fields that change how an update is applied
UNSUPPORTED = (
    "fan_in_fan_out",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of `init_lora_weights` whose adapters belong to a changed copy of the base weights."""
MAX_ALPHA = 1e9
MAX_PATTERN, MAX_REPEATS = 200, 4
Patterns: TypeAlias = list[tuple[re.Pattern[str], float]]


@dataclass(frozen=True)
class PeftConfig:
    """Ranks and scales of an adapter.

    rank, alpha: those of layers without a pattern. ranks, alphas: values of layers whose name matches; the first match
    counts. rank_stabilized: whether the scale is alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732) instead of alpha / rank.
    """

    label: str
    rank: int
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rank_stabilized: bool
    dora: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], label: str) -> PeftConfig:
        """Read the configuration. Raises CheckpointError for values that cannot be, and for unsupported fields."""
        for key in UNSUPPORTED:
            if config.get(key):
                raise CheckpointError(
                    f"{label} has {key}={config[key]!r}, which is not supported; merge it with peft first"
                )
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
            raise CheckpointError(
                f"{label} has init_lora_weights={start!r}, which changes the base weights; save it again with peft's"
                " path_initial_model_for_weight_conversion, and set init_lora_weights to true"
            )
        return cls(
            label,
            _rank(config.get("r"), "r", label),
            _alpha(config.get("lora_alpha"), "lora_alpha", label),
            [(p, _rank(x, f"rank_pattern of {p.pattern!r}", label)) for p, x in _patterns(config, "rank", label)],
            [(p, _alpha(x, f"alpha_pattern of {p.pattern!r}", label)) for p, x in _patterns(config, "alpha", label)],
            bool(config.get("use_rslora")),
            bool(config.get("use_dora")),
        )

    def scale(self, layer: str, rank: int) -> float:
        """Return the factor of a layer's update. layer: its name in the trained model. rank: of its weights.

        Raises CheckpointError if the configuration has another rank.
        """
        expected = _matching(self.ranks, layer, self.rank)
        if rank != expected:
            raise CheckpointError(f"{self.label} has r={expected:g} for {layer}, but its weights have rank {rank}")
        return _matching(self.alphas, layer, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


def _matching(patterns: Patterns, layer: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(layer)), default)


def _patterns(config: Mapping[str, Any], key: str, label: str) -> list[tuple[re.Pattern[str], Any]]:
    """Compile the keys of a pattern as peft does: each matches the whole name or its end after a dot."""
    field = f"{key}_pattern"
    values = config.get(field) or {}
    if not isinstance(values, dict):
        raise CheckpointError(f"{label} has {field}={values!r}; expected names of layers with values")
    compiled = []
    for name, value in values.items():
        # a quantified group, or many repeats, may take exponential time
        repeats = sum(name.count(character) for character in "*+?{")
        try:
            if len(name) > MAX_PATTERN or repeats > MAX_REPEATS or re.search(r"\)[*+?{]", name):
                raise ValueError(f"it is longer than {MAX_PATTERN} characters or repeats too much")
            compiled.append((re.compile(rf"(?:.*\.)?(?:{name})$"), value))
        except (re.error, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{label}: {field} has {name[:MAX_PATTERN]!r}; expected the name of a layer or a simple regular"
                f" expression ({error})"
            ) from error
    return compiled


def _rank(value: object, field: str, label: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{label} has {field}={value!r}; expected a whole number of at least 1")
    return value


def _alpha(value: object, field: str, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_ALPHA:
        raise CheckpointError(f"{label} has {field}={value!r}; expected a number")
    return float(value)
