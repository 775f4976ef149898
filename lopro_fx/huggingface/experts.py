"""Recognise the weights of experts in a transformers model, replace them by packed modules, and restore them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from lopro_fx.huggingface.modules import find_module
from lopro_fx.huggingface.products import PackedExperts
from lopro_fx.models.routed import dispatches, routed_experts_forward


class RoutedExperts(nn.Module):
    """Experts with packed weights. They compute the same whatever implementation a configuration names."""

    forward = routed_experts_forward


class ExpertsWeight(NamedTuple):
    """A parameter of a module of experts, by the module and the parameter's name there."""

    owner: Any
    key: str

    @property
    def parameter(self) -> Tensor:
        return getattr(self.owner, self.key)

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, out_features, in_features)."""
        experts, *sides = self.parameter.shape
        return (experts, *(sides[::-1] if self.owner.is_transposed else sides))

    def replace(self, packed: PackedExperts) -> None:
        """Put a packed module in the parameter's place."""
        delattr(self.owner, self.key)
        setattr(self.owner, self.key, packed)
        if not isinstance(self.owner, RoutedExperts):
            self.owner.__class__ = _around(type(self.owner))


def experts_weight(model: nn.Module, name: str) -> ExpertsWeight | None:
    """Find the experts' parameter of that name; None if there is none that a packed module can replace."""
    path, _, key = name.rpartition(".")
    owner: Any = find_module(model, path)
    if owner is None or not (isinstance(owner, RoutedExperts) or dispatches(owner)):
        return None
    known = ("gate_up_proj" if owner.has_gate else "up_proj", "down_proj")
    return ExpertsWeight(owner, key) if key in known and isinstance(getattr(owner, key), Tensor) else None


def restore_experts(model: nn.Module) -> None:
    """Restore parameters, in place, with the weights that the packed modules compute with."""
    for owner in [module for module in model.modules() if isinstance(module, RoutedExperts)]:
        for key, packed in list(owner.named_children()):
            if isinstance(packed, PackedExperts):
                weight = packed.dense()
                weight = weight.mT.contiguous() if packed.transposed else weight
                delattr(owner, key)
                setattr(owner, key, nn.Parameter(weight, requires_grad=False))
        owner.__class__ = type(owner).__bases__[1]


@cache
def _around(kind: type[nn.Module]) -> type[nn.Module]:
    """Make a subclass of `kind` with another forward."""

    def reduced(self: nn.Module) -> Any:
        return _rebuilt, (kind,), self.__dict__

    return type(f"Packed{kind.__name__}", (RoutedExperts, kind), {"__reduce__": reduced})


def _rebuilt(kind: type[nn.Module]) -> nn.Module:
    made = _around(kind)
    return made.__new__(made)
