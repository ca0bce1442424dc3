"""An engine for many processes: DeepSpeed's ZeRO stages 0 to 3, bf16 weights with fp32 masters, sharded averages.

Each rank reads its own parts of the masters, moments and averages of a checkpoint, and no more of the weights than the
stage lets it hold.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longvideo.checkpoint.run_checkpoint import AVERAGE, MOMENTS, STEP, WEIGHT
from longvideo.checkpoint.tensors import Lazy, read, read_range
from longvideo.errors import ConfigError
from longvideo.training.deepspeed_settings import deepspeed_settings, optimizer_on_shards
from longvideo.training.ema import decay_at
from longvideo.training.engine import add_metrics, all_finite, more_shapes
from longvideo.training.guard import LossGuard
from longvideo.training.objective import Objective, as_ratio
from longvideo.training.ramping import RampingAdamW

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from longvideo.distributed import Mesh
    from longvideo.training.optimizer import OptimizerConfig


class DeepSpeedEngine:
    """An `Engine` that shards optimizer states, gradients and weights over all ranks, depending on the ZeRO stage.

    precision: bf16 (fp32 masters, gradients added up in fp32) or fp32. passes: number of shares of a step.
    """

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        *,
        mesh: Mesh,
        zero_stage: int,
        precision: Literal["bf16", "fp32"],
        passes: int,
        ema_decay: float,
        ema_start: int = 0,
        spike_factor: float = 0.0,
    ) -> None:
        if precision == "bf16" and zero_stage == 0:
            raise ConfigError(
                "parallel.zero_stage=0 keeps no fp32 masters of bf16 weights; use parallel.zero_stage=1 or"
                " trainer.precision=fp32"
            )
        import deepspeed

        # on CPUs DeepSpeed would compile collectives through shared memory; those of gloo suffice
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.objective = objective
        self.mesh = mesh
        self.stage = zero_stage
        self.precision = precision
        self.ema_decay, self.ema_start = ema_decay, ema_start
        self.named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.states = objective.weight_states
        optimizer = optimizer_on_shards(config, self.parameters, self.states, zero_stage=zero_stage)
        # the classes that DeepSpeed returns have no common base
        self.engine: Any
        self.optimizer: Any
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=objective,
            model_parameters=self.parameters,  # pyright: ignore[reportArgumentType]
            optimizer=optimizer,
            config=deepspeed_settings(zero_stage, precision, passes, config.gradient_clip),
            dist_init_required=False,
        )
        # DeepSpeed creates these groups with torch's default timeout
        for group in {self.engine.data_parallel_group, self.engine.seq_data_parallel_group}:
            mesh.limit_waits(group)
        self._start_adam()
        parts = {name: self._own_part(parameter) for name, parameter in self.named.items()}
        self.average = {name: None if part is None else part.clone() for name, part in parts.items()}
        self.guard = LossGuard(spike_factor, self.parameters[0].device, mesh)
        self.skipped = torch.zeros((), device=self.parameters[0].device)

    def train_step(self, shares: Sequence[Any], step: int, learning_rate: float) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.objective.begin(step)
        metrics: dict[str, Tensor] = {}
        num_bad, found_inf = torch.zeros_like(self.skipped), torch.zeros_like(self.skipped)
        norm: Tensor | None = None
        for share in shares:
            loss, more = self.engine(share)
            guarded = self.guard(loss)
            num_bad += _not_finite(guarded.detach())
            self.engine.backward(guarded)
            norm = self._plain_norm()
            if self.engine.is_gradient_accumulation_boundary():
                if self.objective.layer_watch is not None:
                    self.objective.layer_watch.add_gradients(self._whole_gradient)
                found_inf = self._skip_where(num_bad if norm is None else num_bad + _not_finite(norm))
            self.engine.step()
            add_metrics(metrics, {"loss": loss, **more})
        if norm is None:
            norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=num_bad.device)
            norm = torch.where(norm < 0, torch.nan, norm)  # DeepSpeed returns -1 for a norm that is not finite
            # DeepSpeed itself skips the step if a loss is finite but its gradient is not
            found_inf = torch.maximum(found_inf, _not_finite(norm))
        self.skipped += found_inf
        if self.states is not None:
            metrics |= self.states.after_step(step, found_inf, self)
        self._update_average(step)
        return metrics | {"grad": as_ratio(norm)}

    def _skip_where(self, num_bad: Tensor) -> Tensor:
        """Make the optimizers of all ranks skip the step if one rank has a value that is not finite.

        Return 1 in that case and 0 otherwise. The host does not wait for the device.
        """
        found_inf = self.mesh.sum(num_bad).clamp(max=1.0)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        inner.found_inf, inner.grad_scale = found_inf, None
        return found_inf

    def num_skipped(self) -> int:
        return int(self.skipped)

    def skipped_share(self, steps: int) -> float:
        return self.num_skipped() / max(1, steps)

    def is_finite(self) -> bool:
        own = [part for part in (*map(self._own_part, self.parameters), *self.average.values()) if part is not None]
        return all_finite(own)

    @contextmanager
    def averaged(self) -> Generator[None]:
        with torch.no_grad(), ExitStack() as stack:
            if self.stage == 3:
                import deepspeed

                # gathered weights drop their changes at the end of the block
                stack.enter_context(deepspeed.zero.GatheredParameters(self.parameters))
                stack.enter_context(self._without_hooks())
            else:
                before = [p.detach().clone() for p in self.parameters]
                stack.callback(torch._foreach_copy_, [p.data for p in self.parameters], before)  # pyright: ignore
            for parameter, own in zip(self.parameters, self.average.values(), strict=True):
                parameter.data.copy_(self._whole(parameter, own))
            yield

    @contextmanager
    def _without_hooks(self) -> Generator[None]:
        """Let the model run on one rank alone: the hooks of stage 3 gather and free weights on all ranks together."""
        offload = self.optimizer.parameter_offload
        offload._remove_module_hooks()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()

    @property
    def arithmetic(self) -> str:
        return "bf16 weights with fp32 masters" if self.precision == "bf16" else "fp32"

    def shapes(self) -> dict[str, torch.Size]:
        return {name: self._shape(parameter) for name, parameter in self.named.items()}

    def more_shapes(self) -> dict[str, torch.Size]:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return more_shapes(inner, self.named, self.states)

    @torch.no_grad()
    def whole(self, name: str, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.named[name]
        if self.states is not None and f"{name}/{kind}" in self.states.shapes():
            return self.states.whole(name, kind)
        if kind == STEP:
            return next(self._adam_states_of(parameter))[STEP].float()
        if kind == AVERAGE:
            return self._whole(parameter, self.average[name])
        if self._is_plain(parameter):
            return parameter if kind == WEIGHT else self.optimizer.state[parameter][kind]
        value = (
            safe_get_full_fp32_param(parameter) if kind == WEIGHT else safe_get_full_optimizer_state(parameter, kind)
        )
        assert value is not None
        return value

    @torch.no_grad()
    def put(self, name: str, kind: str, stored: Lazy) -> None:
        parameter = self.named[name]
        if kind == STEP:
            for state in self._adam_states_of(parameter):
                state[STEP].clamp_(min=float(read(stored)))
            return
        if self.states is not None and f"{name}/{kind}" in self.states.shapes():
            self.states.put(name, kind, read(stored))
            return
        if f"{name}/{kind}" in self.more_shapes():
            self.optimizer.state[parameter][kind] = read(stored).to(parameter.device)
            return
        part = self._read_own(parameter, stored)
        if kind == WEIGHT:
            self._put_weight(parameter, stored, part)
            if self.states is not None:
                self.states.weight_loaded(name)
        elif kind in MOMENTS:
            self._put_moment(parameter, kind, part)
        elif (average := self.average[name]) is not None:
            own = self._own_part(parameter)
            assert own is not None
            average.copy_(part.view_as(average) if self.ema_decay else own)

    @torch.no_grad()
    def replace(self, name: str, values: Tensor) -> None:
        """Set numbers of a weight in its own dtype, and those of this rank's master."""
        parameter = self.named[name]
        parameter.data.copy_(torch.where(values.isnan(), parameter.data, values))
        if not self._is_plain(parameter) and (own := self._own_part(parameter)) is not None:
            start, count, _ = self._own_range(parameter)
            new = values.flatten().narrow(0, start, count)
            own.copy_(torch.where(new.isnan(), own, new))

    def set_periods(self, name: str, periods: Tensor) -> None:
        assert isinstance(self.optimizer, RampingAdamW)
        self.optimizer.set_periods(self.named[name], periods)

    def counts(self) -> dict[str, float]:
        return {"skipped": self.num_skipped(), **self.guard.state()}

    def put_counts(self, counts: Mapping[str, float]) -> None:
        self.skipped.fill_(float(counts["skipped"]))
        self.guard.load(counts)

    def _read_own(self, parameter: nn.Parameter, stored: Lazy) -> Tensor:
        """Read this rank's values of a parameter's master, flat and padded to the length of its part."""
        start, count, length = self._own_range(parameter)
        return nn.functional.pad(read_range(stored, start, count), (0, length - count)).to(parameter.device)

    def _put_weight(self, parameter: nn.Parameter, stored: Lazy, part: Tensor) -> None:
        """Set the master, and this rank's part of the weight that products are computed with."""
        if self._is_sharded(parameter):
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
            from deepspeed.utils import safe_set_local_fp32_param

            safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)  # type: ignore[attr-defined]
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
                parameter.data.copy_(read(stored))
            return
        parameter.data.copy_(read(stored))
        if not self._is_plain(parameter) and (own := self._own_part(parameter)) is not None:
            own.copy_(part)

    def _put_moment(self, parameter: nn.Parameter, kind: str, part: Tensor) -> None:
        if self._is_plain(parameter):
            self.optimizer.state[parameter][kind].copy_(part.view_as(parameter))
        elif self._is_sharded(parameter):
            from deepspeed.utils import safe_set_local_optimizer_state

            safe_set_local_optimizer_state(parameter, part, kind)
        elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
            parameter._hp_mapping.get_optim_state_fragment(kind).copy_(part)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        decay = decay_at(self.ema_decay, step, self.ema_start)
        for parameter, average in zip(self.parameters, self.average.values(), strict=True):
            if average is not None:
                own = self._own_part(parameter)
                assert own is not None
                average.lerp_(own, 1.0 - decay)

    def _whole_gradient(self, name: str) -> Tensor | None:
        """Return the gradient of a step between its last backward pass and the update. Every rank calls it."""
        from deepspeed.utils import safe_get_full_grad

        parameter = self.named[name]
        return parameter.grad if self._is_plain(parameter) else safe_get_full_grad(parameter)

    def _plain_norm(self) -> Tensor | None:
        """Return the norm of the gradients if DeepSpeed clips them without recording it."""
        if not all(map(self._is_plain, self.parameters)) or not self.engine.is_gradient_accumulation_boundary():
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _is_sharded(self, parameter: nn.Parameter) -> bool:
        """Return whether DeepSpeed divided the parameter itself among ranks, as stage 3 does."""
        return hasattr(parameter, "ds_id")

    def _is_plain(self, parameter: nn.Parameter) -> bool:
        """Return whether DeepSpeed left the parameter unchanged: an fp32 weight, with nothing sharded."""
        return not self._is_sharded(parameter) and not hasattr(parameter, "_hp_mapping")

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def _own_part(self, parameter: nn.Parameter) -> Tensor | None:
        """Return this rank's fp32 master values, flat, or None if it has none."""
        if self._is_plain(parameter):
            return parameter.detach()
        if self._is_sharded(parameter):
            from deepspeed.utils import safe_get_local_fp32_param

            part = safe_get_local_fp32_param(parameter)
            assert part is not None
            return part.detach()
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return None if mapping is None else mapping.hp_fragment.detach()

    def _own_range(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """Return the start, the number of values and the padded length of this rank's part of the flat parameter."""
        numel = self._shape(parameter).numel()
        if self._is_plain(parameter):
            return 0, numel, numel
        if self._is_sharded(parameter):
            size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            start = min(self.mesh.rank * size, numel)
            return start, min(size, numel - start), size
        if parameter._hp_mapping is None:  # type: ignore[attr-defined]
            return 0, 0, 0
        address = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
        return address.start, address.numel, address.numel

    def _whole(self, parameter: nn.Parameter, own: Tensor | None) -> Tensor:
        """Assemble a tensor in the shape of a parameter from the parts of all ranks, on all of them."""
        if self._is_plain(parameter):
            assert own is not None
            return own
        shape = self._shape(parameter)
        if self._is_sharded(parameter):
            assert own is not None
            parts = torch.empty(self.mesh.world * own.numel(), dtype=own.dtype, device=own.device)
            dist.all_gather_into_tensor(parts, own.contiguous())  # pyright: ignore[reportDeprecated]
            return parts[: shape.numel()].view(shape)
        whole = torch.zeros(shape.numel(), dtype=torch.float32, device=parameter.device)
        if own is not None:
            start, count, _ = self._own_range(parameter)
            whole.narrow(0, start, count).copy_(own)
        return self.mesh.sum(whole).view(shape)

    def _start_adam(self) -> None:
        """Create Adam's state at step 0 before the first step, because a checkpoint may be loaded into it."""
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
                state |= {n: torch.zeros(shape, device=device) for n, shape in inner.more_states(parameter).items()}
        for state in self._adam_states():
            state["step"].zero_()  # DeepSpeed may create the states by a step without gradients
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _adam_states(self) -> Iterator[dict[str, Any]]:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        yield from (state for state in inner.state.values() if "step" in state)

    def _adam_states_of(self, parameter: nn.Parameter) -> Iterator[dict[str, Any]]:
        """Yield the states that count the steps of a parameter; sharded parameters share those of flat tensors."""
        if self._is_plain(parameter):
            yield self.optimizer.state[parameter]
        else:
            yield from self._adam_states()


def _not_finite(x: Tensor) -> Tensor:
    """Return 1 where a value is infinite or NaN, and 0 elsewhere."""
    return (~torch.isfinite(x)).float()
