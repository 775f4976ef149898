"""Packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

Scalar = int | float | str


@dataclass(frozen=True)
class Packed:
    """A packed weight.

    Args:
        format: name of its format, a key of `registry.FORMATS`.
        shape: (out_features, in_features).
        spec: numbers and names that its format needs to read the tensors, ready for JSON.
        tensors: by name, in the format's order; buffers of a program and operands of an operator.
    """

    format: str
    shape: tuple[int, int]
    spec: Mapping[str, Scalar]
    tensors: Mapping[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The same with each tensor changed."""
        return replace(self, tensors={name: change(tensor) for name, tensor in self.tensors.items()})
