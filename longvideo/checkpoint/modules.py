"""Load weights into modules. File headers are compared with the module before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from longvideo.checkpoint.tensors import Weights, check_finite, listing
from longvideo.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RANDOM_IN_PLACE = (Tensor.normal_, Tensor.uniform_)


def check_fits(module: nn.Module, weights: Weights) -> None:
    """Compare the names, shapes and dtypes of a module's state with those on disk.

    module: on any device, meta included. A floating tensor may be stored in any floating dtype. One name is enough for
    tied parameters. Raises CheckpointError with the missing and unexpected tensors and those of a wrong shape or dtype.
    """
    expected = module.state_dict(keep_vars=True)
    infos, aliases = weights.infos, _aliases(expected)
    stored = {aliases.get(name, name) for name in infos}
    missing = [name for name in expected if name not in infos and aliases.get(name, name) not in stored]
    unexpected = [name for name in infos if name not in expected]
    misshapen = [
        f"{name} {list(info.shape)}, expected {list(expected[name].shape)}"
        for name, info in infos.items()
        if name in expected and info.shape != tuple(expected[name].shape)
    ]
    mistyped = [
        f"{name} {info.dtype}, expected {expected[name].dtype}"
        for name, info in infos.items()
        if name in expected and info.dtype.is_floating_point != expected[name].is_floating_point()
    ]
    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("wrongly shaped", misshapen),
        ("wrongly typed", mistyped),
    )
    problems = [f"{len(names)} {kind}: {listing(names)}" for kind, names in kinds if names]
    if problems:
        raise CheckpointError(f"{weights.label} does not fit the model: " + "; ".join(problems))


class OnMeta(TorchFunctionMode):
    """Build modules without memory for their weights and without drawing initial values.

    Under plain `torch.device("meta")` torch imports its compiler, which takes seconds, when a module draws or scales
    random numbers. Here drawing is skipped, and torch.randn returns uninitialized memory on the CPU.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM_IN_PLACE or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        with torch.device("meta"):
            return func(*args, **kwargs)


def load_weights(
    module: nn.Module,
    weights: Weights,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Load weights into a module on the meta device or any other, after `check_fits`.

    dtype: of floating parameters; None keeps the stored one. Parameters become new tensors on `device`, so optimizers
    must be built afterwards. Buffers, such as packed codes and their scales, keep their stored dtype. Tied parameters
    stay tied. Raises CheckpointError before anything is loaded if the weights do not fit, and for NaN or infinity in a
    tensor.
    """
    check_fits(module, weights)
    device = torch.device(device)
    state = module.state_dict(keep_vars=True)
    aliases = _aliases(state)
    stored_as = {aliases.get(name, name): name for name in weights.infos}
    loaded: dict[str, Tensor] = {}
    for name, old in state.items():
        own_name = aliases.get(name, name)
        if own_name not in loaded:
            tensor = weights.read(stored_as[own_name], device)
            if isinstance(old, nn.Parameter):
                tensor = nn.Parameter(_cast(tensor, dtype), requires_grad=old.requires_grad)
            check_finite(tensor.detach(), f"{weights.label}: {own_name}")
            loaded[own_name] = tensor
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, loaded[own_name])
    on_meta = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not on_meta, f"buffers {on_meta} are not in the weight file, so they must not be created on the meta device"
    module.to(device)  # for buffers that are never stored


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module for saving; tied parameters appear once, under their first name."""
    state = module.state_dict(keep_vars=True)
    aliases = _aliases(state)
    return {name: tensor.detach() for name, tensor in state.items() if name not in aliases}


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    first_name: dict[int, str] = {}
    return {name: first for name, tensor in state.items() if (first := first_name.setdefault(id(tensor), name)) != name}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
