"""Operands of a call by the names that its operator's schema gives them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.kernels.plan import ACTIVATIONS

# Never part of a packed weight, even if the program stores them: inputs of a token, and tensors of the original model.
_NO_WEIGHTS = frozenset({*ACTIVATIONS, "ids", "bias", "norm"})


@dataclass(frozen=True)
class Operands:
    """Operands of one call, in the schema's order and with its defaults; `operands.codes` is the one of that name.

    Raises:
        GraphError: on access, the schema has no operand of that name.
    """

    operator: OpOverload
    named: dict[str, Any]

    @classmethod
    def of(cls, operator: OpOverload, /, **named: Any) -> Operands:
        """Operands of a new call. Optional tensors that are not named are None.

        Raises:
            GraphError: the schema has no operand of a name, or an operand is missing.
        """
        schema = _schema(operator)
        for name in named.keys() - schema.keys():
            raise _unknown(operator, name)
        filled = {}
        for name, argument in schema.items():
            optional = argument.has_default_value() or isinstance(argument.type, torch.OptionalType)
            if name not in named and not optional:
                raise GraphError(f"{operator} needs the operand '{name}'")
            filled[name] = named.get(name, argument.default_value)
        return cls(operator, filled)

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling look for such methods before `named` is set.
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self.named:
            raise _unknown(self.operator, name)
        return self.named[name]

    @property
    def args(self) -> tuple[Any, ...]:
        """Operands without a default, by position."""
        return tuple(self.named[name] for name, argument in _schema(self.operator).items() if _is_given(argument))

    @property
    def kwargs(self) -> dict[str, Any]:
        """Operands that differ from their default, by name."""
        return {name: self.named[name] for name, argument in _schema(self.operator).items()
                if not _is_given(argument) and self.named[name] != argument.default_value}  # fmt: skip

    @property
    def weights(self) -> dict[str, Node]:
        """Operands that stand for a weight: every node that is no activation, ids, bias or norm."""
        return {name: value for name, value in self.named.items()
                if isinstance(value, Node) and name not in _NO_WEIGHTS}  # fmt: skip

    def replace(self, /, **changes: Any) -> Operands:
        """The same call with other operands."""
        return self.of(self.operator, **{**self.named, **changes})

    def to(self, operator: OpOverload, /, **changes: Any) -> Operands:
        """Operands of another operator: those of the same names, and `changes`.

        Raises:
            GraphError: the other operator has no place for an operand that is set.
        """
        names = _schema(operator)
        for name, argument in _schema(self.operator).items():
            if name not in names and self.named[name] != argument.default_value:
                raise GraphError(f"{operator} has no operand '{name}', which {self.operator} sets")
        kept = {name: value for name, value in self.named.items() if name in names}
        return self.of(operator, **{**kept, **changes})

    def write(self, node: Node) -> None:
        """Give a node of this operator these operands."""
        node.args, node.kwargs = self.args, self.kwargs


def operands(node: Node) -> Operands:
    """Operands of a node that calls a registered operator, however they are passed."""
    assert isinstance(node.target, OpOverload)
    return Operands.of(node.target, **dict(zip(_schema(node.target), node.args, strict=False)), **node.kwargs)


@functools.cache
def _schema(operator: OpOverload) -> dict[str, Any]:
    """Arguments of the operator's schema by name."""
    return {argument.name: argument for argument in operator._schema.arguments}


def _is_given(argument: Any) -> bool:
    """Whether an argument is positional and has no default."""
    return not argument.has_default_value() and not argument.kwarg_only


def _unknown(operator: OpOverload, name: str) -> GraphError:
    return GraphError(f"{operator} has no operand '{name}'; it has {', '.join(_schema(operator))}")
