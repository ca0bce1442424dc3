"""Put weights into modules: headers are compared with the module before a single weight is loaded."""

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
    """Compare the names and shapes a module (on any device, meta too) expects with those on disk.

    Raises CheckpointError listing missing, unexpected, wrongly shaped and wrongly typed tensors: where the module has
    floating numbers any floating dtype will do, and nothing else. Of tied parameters one name suffices.
    """
    expected = module.state_dict(keep_vars=True)
    infos, aliases = weights.infos, _aliases(expected)
    there = {aliases.get(name, name) for name in infos}
    missing = [name for name in expected if name not in infos and aliases.get(name, name) not in there]
    unexpected = [name for name in infos if name not in expected]
    misshapen = [
        f"{name} {list(info.shape)}, wanted {list(expected[name].shape)}"
        for name, info in infos.items()
        if name in expected and info.shape != tuple(expected[name].shape)
    ]
    mistyped = [
        f"{name} {info.dtype}, wanted {expected[name].dtype}"
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
    """Build modules inside without memory for their weights, and without drawing initial ones.

    Under plain `torch.device("meta")` torch imports its compiler, for seconds, as soon as a module draws or scales
    random numbers. Here drawing is skipped; torch.randn gives uninitialised memory, off meta so that it can be scaled.
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
    """Put weights into a module built on the meta device (or any other), after check_fits.

    Parameters become new tensors on device, floating ones cast to dtype (None keeps what is stored), so optimisers are
    built afterwards; buffers, such as packed codes and their scales, keep what is stored. Tied parameters stay tied.
    Raises CheckpointError before anything is loaded if anything is amiss, and for NaN or infinity in a tensor.
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
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers {left} are not in the weight file, so they must not be made on the meta device"
    module.to(device)  # buffers that are never stored


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """List the state of a module for saving, tied parameters once, under their first name."""
    state = module.state_dict(keep_vars=True)
    aliases = _aliases(state)
    return {name: tensor.detach() for name, tensor in state.items() if name not in aliases}


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    first_name: dict[int, str] = {}
    return {name: first for name, tensor in state.items() if (first := first_name.setdefault(id(tensor), name)) != name}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
