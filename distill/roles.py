"""Three networks on one frozen backbone: student and critic are adapters on it, the teacher is the backbone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import torch
from peft import LoraConfig
from torch import Tensor, nn

from longvideo.config.fields import Bounded, bounded
from longvideo.errors import ConfigError, shown
from longvideo.quantization.lora import TARGETS, LoraLinear, add_lora

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from longvideo.model.attention import AttentionPattern, Filling
    from longvideo.model.cache import ChunkCache
    from longvideo.model.layout import TokenLayout
    from longvideo.model.rope import Rope
    from longvideo.model.transformer import CausalTransformer, TextContext


class Role(Enum):
    STUDENT = "student"
    CRITIC = "critic"
    TEACHER = "teacher"


class Network(Protocol):
    """The methods of a `CausalTransformer` that distillation uses."""

    def rope(self, layout: TokenLayout, /) -> Rope: ...

    def encode_text(self, features_PJD: Tensor) -> TextContext: ...

    def __call__(
        self,
        latents_BCTHW: Tensor,
        sigma_BT: Tensor,
        text: TextContext,
        *,
        rope: Rope,
        attention: AttentionPattern,
        checkpoint: bool = False,
    ) -> Tensor: ...

    def fill_cache(
        self, latents_BCTHW: Tensor, sigma_BT: Tensor, text: TextContext, *, rope: Rope, attention: Filling
    ) -> None: ...


class Roles(Protocol):
    """The networks of all roles, of which one is active at a time."""

    device: torch.device

    def switch(self, role: Role) -> Network:
        """Return the network of a role. It has that role, its backward pass included, until the next switch."""
        ...

    def trained(self, role: Role) -> dict[str, nn.Parameter]:
        """Return the trained parameters of the student or of the critic, by name."""
        ...

    def new_cache(self, role: Role, batch: int, /) -> ChunkCache:
        """Return an empty cache for the network of a role."""
        ...


@dataclass(frozen=True)
class LoraSettings(Bounded):
    """Size of the adapters.

    rank: rank of every update.
    alpha: factor of every update, divided by the rank.
    targets: layers that are updated, by the end of their names.
    """

    rank: int = bounded(128, least=1)
    alpha: float = bounded(128.0, above=0)
    targets: list[str] = field(default_factory=lambda: list(TARGETS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ConfigError(f"lora.targets is empty; expected some of {', '.join(TARGETS)}")

    @property
    def scaling(self) -> float:
        """Factor of every update."""
        return self.alpha / self.rank

    def layers(self, names: Iterable[str]) -> list[str]:
        """Return those of the layers of a model that are updated. Raises ConfigError for a target without a layer."""
        names = list(names)
        for target in self.targets:
            if not any(_has_target(name, target) for name in names):
                raise ConfigError(
                    f"lora.targets contains {shown(target)}, but no linear layer of the blocks has such a name;"
                    f" expected some of {', '.join(TARGETS)}"
                )
        return [name for name in names if any(_has_target(name, target) for target in self.targets)]

    def config(self) -> LoraConfig:
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.targets)  # type: ignore[arg-type]


class LoraRoles:
    """Adapters on a frozen transformer, switched by peft.

    student: the backbone. teacher: another backbone with other weights, which then has the critic's adapter; by default
    the student's backbone. Adapters start in float32 from `seed`, without an effect on the output.
    """

    def __init__(
        self,
        student: CausalTransformer,
        lora: LoraSettings,
        *,
        teacher: CausalTransformer | None = None,
        new_cache: Callable[[int], ChunkCache],
        seed: int = 0,
    ) -> None:
        self.device = student.patch_embedding.weight.device
        self.backbones = {Role.STUDENT: student, Role.CRITIC: teacher or student, Role.TEACHER: teacher or student}
        own = add_lora(student, lora.config(), adapter_name=Role.STUDENT.value)
        if teacher is None:
            config = lora.config()
            config._register_custom_module({nn.Linear: LoraLinear})
            own.add_adapter(Role.CRITIC.value, config)
        else:
            add_lora(teacher, lora.config(), adapter_name=Role.CRITIC.value)
        # searching the layers at every switch would take longer than the switch
        self._layers = {
            role: [layer for layer in backbone.modules() if isinstance(layer, LoraLinear)]
            for role, backbone in self.backbones.items()
        }
        self._new_cache = new_cache
        self._active: Role | None = None
        generator = torch.Generator().manual_seed(seed)
        for role in (Role.STUDENT, Role.CRITIC):
            initialize_adapter(self.trained(role), generator, self.device)
        self.switch(Role.STUDENT)

    def switch(self, role: Role) -> CausalTransformer:
        if role is not self._active:
            for layer in self._layers[role]:
                layer.enable_adapters(role is not Role.TEACHER)
                if role is not Role.TEACHER:
                    layer.set_adapter(role.value)
            self._active = role
        return self.backbones[role]

    def trained(self, role: Role) -> dict[str, nn.Parameter]:
        return adapter_weights(self.backbones[role], role)

    def new_cache(self, _role: Role, batch: int) -> ChunkCache:
        return self._new_cache(batch)


def adapter_weights(model: CausalTransformer, role: Role) -> dict[str, nn.Parameter]:
    """Return the low-rank weights of a role's adapter, named `blocks.0.self_attn.q.lora_A` and so on."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear) and role.value in layer.lora_A:
            weights[f"{name}.lora_A"] = layer.lora_A[role.value].weight
            weights[f"{name}.lora_B"] = layer.lora_B[role.value].weight
    return weights


def _has_target(name: str, target: str) -> bool:
    """Return whether peft finds a layer by a target."""
    return name == target or name.endswith(f".{target}")


@torch.no_grad()
def initialize_adapter(weights: Mapping[str, nn.Parameter], generator: torch.Generator, device: torch.device) -> None:
    """Draw an adapter without an effect on the output, in float32."""
    for name, weight in weights.items():
        fresh = torch.zeros(weight.shape)
        if name.endswith(".lora_A"):
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        weight.data = fresh.to(device)
