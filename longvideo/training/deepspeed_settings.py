"""DeepSpeed's settings, and the optimizers that work on its shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longvideo.errors import ConfigError
from longvideo.training.optimizer import new_optimizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from longvideo.training.adamw import FusedAdamW
    from longvideo.training.objective import WeightStates
    from longvideo.training.optimizer import OptimizerConfig


def optimizer_on_shards(
    config: OptimizerConfig, parameters: Sequence[nn.Parameter], states: WeightStates | None, *, zero_stage: int
) -> FusedAdamW:
    """Return the optimizer of a configuration. Raises ConfigError, with what works, if it cannot work on the shards."""
    if states is not None and zero_stage == 3:
        raise ConfigError(
            f"{states.setting} needs whole weights, which parallel.zero_stage=3 divides; use parallel.zero_stage=2 or"
            " lower"
        )
    if states is not None and states.ramped and zero_stage > 0:
        raise ConfigError(
            f"{states.setting} needs whole moments, which parallel.zero_stage={zero_stage} divides; use"
            " weights_over_time=reset or q-ema, or parallel.zero_stage=0 with trainer.precision=fp32"
        )
    optimizer = new_optimizer(config, parameters, () if states is None else states.ramped)
    if zero_stage > 0 and any(map(optimizer.more_states, parameters)):
        raise ConfigError(
            f"optimizer.name={config.name} needs whole gradients, which parallel.zero_stage={zero_stage} divides;"
            " use optimizer.name=spam or adamw, or parallel.zero_stage=0 with trainer.precision=fp32"
        )
    return optimizer


def deepspeed_settings(zero_stage: int, precision: str, passes: int, gradient_clip: float) -> dict[str, Any]:
    """Return the settings of an engine. passes: number of backward passes of a step."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": gradient_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": precision == "bf16"},
        # the gradients of a single pass are not added up
        "data_types": {"grad_accum_dtype": "bf16" if precision == "bf16" and passes == 1 else "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
