"""Many processes through DeepSpeed: ZeRO stages 0 to 3, bf16 weights with fp32 masters, sharded averages.

Checkpoints hold whole tensors by name, each written by one of the ranks, so any number of ranks and any stage can go on
from them; safetensors, so loading runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from longvideo.errors import CheckpointError
from longvideo.training.ema import decay_at
from longvideo.training.engine import add_metrics, all_finite, check_same, read_part
from longvideo.training.guard import LossGuard
from longvideo.training.mesh import Mesh
from longvideo.training.objective import Objective, as_ratio
from longvideo.training.optimizer import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT, AVERAGE = "weight", "average"
INDEX_FILE = "index.json"


class DeepSpeedEngine:
    """An `Engine` whose optimiser state, gradients and weights are sharded over all ranks, as far as the stage says.

    precision: bf16 (fp32 masters, gradients added up in fp32) or fp32. passes: shares of a step.
    """

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        *,
        mesh: Mesh,
        zero_stage: int,
        precision: str,
        passes: int,
        ema_decay: float,
        spike_factor: float = 0.0,
    ):
        import deepspeed

        # on CPUs it would compile collectives through shared memory when it first runs; gloo's serve
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.objective = objective
        self.mesh = mesh
        self.stage = zero_stage
        self.ema_decay = ema_decay
        self.named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=self.parameters[0].device.type == "cuda",
        )
        # what DeepSpeed returns has no common type
        self.engine: Any
        self.optimizer: Any
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=objective,
            model_parameters=self.parameters,  # pyright: ignore[reportArgumentType]
            optimizer=optimizer,
            config=_settings(zero_stage, precision, passes, config.gradient_clip),
            dist_init_required=False,
        )
        # made with torch's own timeout, whatever the default group has
        for group in {self.engine.data_parallel_group, self.engine.seq_data_parallel_group}:
            mesh.limit_waits(group)
        self._start_adam()
        self.average = [None if x is None else x.clone() for x in map(self._own_part, self.parameters)]
        self.guard = LossGuard(spike_factor, self.parameters[0].device)
        self._skipped_before = 0

    def train_step(self, shares: Sequence[Any], step: int, learning_rate: float) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.objective.begin(step)
        metrics: dict[str, Tensor] = {}
        for share in shares:
            loss, found = self.engine(share)
            self.engine.backward(self.guard(loss))
            norm = self._plain_norm()
            self.engine.step()
            add_metrics(metrics, {"loss": loss, **found})
        if norm is None:
            norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=loss.device)
        self._update_average(step)
        return metrics | {"grad": as_ratio(norm)}

    def num_skipped(self) -> int:
        return self.engine.skipped_steps + self._skipped_before

    def skipped_share(self, steps: int) -> float:
        return self.num_skipped() / max(1, steps)

    def is_finite(self) -> bool:
        own = [part for part in (*map(self._own_part, self.parameters), *self.average) if part is not None]
        return all_finite(own)

    def counts(self) -> dict[str, float]:
        return {"skipped": self.num_skipped(), **self.guard.state()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with torch.no_grad(), ExitStack() as stack:
            if self.stage == 3:
                import deepspeed

                # what is written into gathered weights is dropped when they are let go
                stack.enter_context(deepspeed.zero.GatheredParameters(self.parameters))
            else:
                before = [p.detach().clone() for p in self.parameters]
                stack.callback(torch._foreach_copy_, [p.data for p in self.parameters], before)
            for parameter, own in zip(self.parameters, self.average, strict=True):
                parameter.data.copy_(self._whole(parameter, own))
            yield

    def save(self, folder: Path) -> None:
        """Write whole tensors, those of every so-many-th parameter by this rank."""
        tensors: dict[str, Tensor] = {}
        for number, (name, parameter) in enumerate(self.named.items()):
            own = number % self.mesh.world == self.mesh.rank
            for kind, value in self._state_of(number, parameter):
                if own:
                    tensors[f"{name}/{kind}"] = value.cpu().contiguous()
        save_file(tensors, folder / f"rank_{self.mesh.rank:05d}.safetensors")
        if self.mesh.is_main:
            count = next((float(state["step"]) for state in self._adam_states()), 0.0)
            (folder / INDEX_FILE).write_text(json.dumps({"files": self.mesh.world, "adam_step": count}))

    @torch.no_grad()
    def load(self, folder: Path, *, counts: Mapping[str, Any]) -> None:
        """Every rank reads all files, one after the other, and keeps what is its own."""
        try:
            index = json.loads((folder / INDEX_FILE).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{folder} is not a checkpoint of several processes ({error}); go on with the engine that wrote it"
            ) from error
        shapes: dict[str, torch.Size] = {}
        for file in range(index["files"]):
            for key, value in read_part(folder, f"rank_{file:05d}").items():
                name, _, kind = key.rpartition("/")
                if kind == WEIGHT:
                    shapes[name] = value.shape
                if name in self.named and value.shape == self._shape(self.named[name]):
                    self._put(self.named[name], kind, value)
        check_same({name: self._shape(p) for name, p in self.named.items()}, shapes)
        for state in self._adam_states():
            state["step"].fill_(index["adam_step"])
        self._skipped_before = int(counts["skipped"])
        self.guard.load(counts)

    def _state_of(self, number: int, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor that belongs to a parameter, whole, on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._is_plain(parameter):
            state = self.optimizer.state[parameter]
            yield from ((WEIGHT, parameter.detach()), *((name, state[name]) for name in MOMENTS))
        else:
            found = {WEIGHT: safe_get_full_fp32_param(parameter)}
            found |= {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            for kind, value in found.items():
                assert value is not None
                yield kind, value
        yield AVERAGE, self._whole(parameter, self.average[number])

    def _put(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(parameter.device)
        if kind == AVERAGE:
            number = next(i for i, p in enumerate(self.parameters) if p is parameter)
            average = self.average[number]
            if average is not None:
                average.copy_(self._part_of(parameter, value))
        elif kind == WEIGHT:
            self._put_weight(parameter, value)
            if not self._is_plain(parameter):
                safe_set_full_fp32_param(parameter, value)
        elif self._is_plain(parameter):
            self.optimizer.state[parameter][kind].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _put_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.stage < 3:
            parameter.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        decay = decay_at(self.ema_decay, step)
        for parameter, average in zip(self.parameters, self.average, strict=True):
            if average is not None:
                own = self._own_part(parameter)
                assert own is not None
                average.lerp_(own, 1.0 - decay)

    def _plain_norm(self) -> Tensor | None:
        """Return the norm of the gradients where DeepSpeed clips without saying what it was."""
        if not all(map(self._is_plain, self.parameters)) or not self.engine.is_gradient_accumulation_boundary():
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _is_plain(self, parameter: nn.Parameter) -> bool:
        """Whether DeepSpeed left the parameter as it is: fp32 weights, nothing sharded."""
        return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def _own_part(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the fp32 master values that this rank holds, flat, or None."""
        if self._is_plain(parameter):
            return parameter.detach()
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_local_fp32_param

            part = safe_get_local_fp32_param(parameter)
            assert part is not None
            return part.detach()
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return None if mapping is None else mapping.hp_fragment.detach()

    def _part_of(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """Return the part of a whole tensor that this rank holds of a parameter."""
        if self._is_plain(parameter):
            return whole
        flat = whole.flatten()
        if hasattr(parameter, "ds_id"):
            size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            padded = nn.functional.pad(flat, (0, size * self.mesh.world - flat.numel()))
            return padded.narrow(0, self.mesh.rank * size, size)
        address = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
        return flat.narrow(0, address.start, address.numel)

    def _whole(self, parameter: nn.Parameter, own: Tensor | None) -> Tensor:
        """Assemble a tensor in the shape of a parameter from the parts of all ranks, on all of them."""
        if self._is_plain(parameter):
            assert own is not None
            return own
        shape = self._shape(parameter)
        if hasattr(parameter, "ds_id"):
            assert own is not None
            parts = torch.empty(self.mesh.world * own.numel(), dtype=own.dtype, device=own.device)
            dist.all_gather_into_tensor(parts, own.contiguous())
            return parts[: shape.numel()].view(shape)
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
        if own is not None:
            self._part_of(parameter, whole).copy_(own)
        return self.mesh.sum(whole).view(shape)

    def _start_adam(self) -> None:
        """Let Adam's state exist before the first step, at step 0, as a checkpoint may have to be put into it."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        masters = [p for group in inner.param_groups for p in group["params"]]
        if self.stage == 3:
            masters = self.optimizer.fp32_partitioned_groups_flat
        for parameter in masters:
            state = inner.state[parameter]
            if not state:
                device = parameter.device if inner.defaults.get("fused") else "cpu"
                state["step"] = torch.zeros((), device=device)
                state |= {name: torch.zeros_like(parameter) for name in MOMENTS}
        for state in self._adam_states():
            state["step"].zero_()  # where DeepSpeed makes the states by a step without gradients
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _adam_states(self) -> Iterator[dict[str, Any]]:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        yield from (state for state in inner.state.values() if "step" in state)


def _settings(zero_stage: int, precision: str, passes: int, gradient_clip: float) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": gradient_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": precision == "bf16"},
        # one pass has nothing to add up
        "data_types": {"grad_accum_dtype": "bf16" if precision == "bf16" and passes == 1 else "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
