"""Packed weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Scalar = int | float | str


@dataclass(frozen=True)
class Packed:
    """A packed weight.

    Args:
        format: name of its format, a key of `registry.FORMATS`.
        shape: (out_features, in_features), or (experts, out_features, in_features).
        spec: numbers and names that its format needs to read the tensors, ready for JSON.
        tensors: by name, in the format's order; buffers of a program and operands of an operator. Those of experts
            have one more dimension, the first.
    """

    format: str
    shape: tuple[int, ...]
    spec: Mapping[str, Scalar]
    tensors: Mapping[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The same with each tensor changed."""
        return replace(self, tensors={name: change(tensor) for name, tensor in self.tensors.items()})

    @property
    def experts(self) -> int:
        """Number of experts; 0 for a single weight."""
        return self.shape[0] if len(self.shape) == 3 else 0

    def expert(self, index: int) -> Packed:
        """The weight of one expert."""
        tensors = {name: tensor[index] for name, tensor in self.tensors.items()}
        return replace(self, shape=self.shape[1:], tensors=tensors)


def stacked(parts: Sequence[Packed]) -> Packed:
    """Stack the weights of experts, of one shape and spec.

    A tensor that has several floating-point dtypes gets the widest.
    """
    first, tensors = parts[0], {}
    for name in first.tensors:
        dtype = functools.reduce(torch.promote_types, (part.tensors[name].dtype for part in parts))
        tensors[name] = torch.stack([part.tensors[name].to(dtype) for part in parts])
    return replace(first, shape=(len(parts), *first.shape), tensors=tensors)
