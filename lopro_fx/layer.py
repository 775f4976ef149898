"""Solved layers (`Layer`) and what layers of one input share (`Input`): made by methods, held by passes and files.

W ≈ (Q + B A) Tᵀ    Q: `Layer.weight`, B: `Layer.up`, A: `Input.down`, T: `Input.transform`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lopro_fx.kernels.activation.reference import round_activation
from lopro_fx.kernels.formats.base import Packed
from lopro_fx.kernels.formats.registry import dequantize
from lopro_fx.kernels.project.reference import dense_factor
from lopro_fx.kernels.rotate.reference import rotate, unrotate


@dataclass(frozen=True)
class Transform:
    """Operands of `lopro::rotate`: perm int16/int32 (n,), signs uint8 (ceil(n/8),), Hadamard block, columns to skip."""

    perm: Tensor | None = None
    signs: Tensor | None = None
    block: int = 1
    skip: int = 0

    @property
    def is_identity(self) -> bool:
        return self.perm is None and self.block == 1

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) to Tᵀ x; applied to the rows of W it gives W T."""
        return x if self.is_identity else rotate(x, self.perm, self.signs, self.block, self.skip)

    def inverse(self, x: Tensor) -> Tensor:
        """Undo `forward`: W T back to W."""
        return x if self.is_identity else unrotate(x, self.perm, self.signs, self.block, self.skip)

    def gram(self, hessian: Tensor) -> Tensor:
        """Tᵀ H T for symmetric H (n, n)."""
        return self.forward(self.forward(hessian).T.contiguous())


@dataclass(frozen=True)
class Factor:
    """Stored low-rank factor: int8 codes with a scale per component, or fp16 values with or without one.

    `values` is (rank, n) for a down factor and (m, rank) for an up factor; `dim` is the dimension of the components.
    """

    values: Tensor
    scale: Tensor | None
    dim: int

    @property
    def rank(self) -> int:
        return self.values.shape[self.dim]

    def dense(self) -> Tensor:
        """Return the fp32 values that the operators compute with."""
        return dense_factor(self.values, self.scale, self.dim)


@dataclass(frozen=True)
class Activation:
    """Operands of `lopro::round_activation`: bits of a number (4 or 8), columns that share a step (-1: all)."""

    bits: int
    group: int

    def forward(self, x: Tensor) -> Tensor:
        """Round x (..., n), in its dtype."""
        return round_activation(x, self.bits, self.group)


@dataclass(frozen=True)
class Input:
    """Shared part of the layers that read one tensor.

    Args:
        name: name of the first of them.
        readers: names of all of them, in graph order.
        in_features: width of the tensor.
        transform: applied to the tensor.
        down: low-rank down factor, applied to the transformed tensor; None without a branch.
        activation: rounding of the transformed tensor for the packed weights; the branch takes it unrounded.
    """

    name: str
    readers: tuple[str, ...]
    in_features: int
    transform: Transform = Transform()
    down: Factor | None = None
    activation: Activation | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by buffer name: perm, signs, down, down_scale."""
        found = {"perm": self.transform.perm, "signs": self.transform.signs, **_named("down", self.down)}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Input:
        """Return a copy with `change` applied to each tensor."""
        old, down = self.transform, self.down
        perm, signs = (None if tensor is None else change(tensor) for tensor in (old.perm, old.signs))
        return replace(self, transform=replace(old, perm=perm, signs=signs), down=_mapped(down, change))


@dataclass(frozen=True)
class Layer:
    """One quantised Linear, or the experts of a layer.

    Args:
        name: fully qualified.
        input: name of its `Input`.
        weight: packed, (out_features, in_features) of the transformed input, or such for each of the experts.
        up: low-rank up factor; None without a branch. Of experts, (columns, out_features, rank), with dim=-1.
        metrics: the layer's row in the report, ready for JSON.
        embedding: whether embeddings that share the weight read it packed too.
        cells: int32 (experts, 2), row of the down factor and column of the up factor of each expert; None gives each
            its own. The input's down factor is (rows * rank, in_features).
        core: fp16 (experts, rank, rank) between the factors; None for the identity.
    """

    name: str
    input: str
    weight: Packed
    up: Factor | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    embedding: bool = False
    cells: Tensor | None = None
    core: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    @property
    def experts(self) -> int:
        """Number of experts; 0 for a Linear."""
        return self.weight.experts

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.weight.shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by buffer name: those of the format, up, up_scale, cells, core."""
        others = {"cells": self.cells, "core": self.core}
        given = {key: tensor for key, tensor in others.items() if tensor is not None}
        return {**self.weight.tensors, **_named("up", self.up), **given}

    @property
    def facts(self) -> dict[str, Any]:
        """Metrics that follow from the tensors."""
        return {
            "format": self.weight.format,
            **self.weight.spec,
            "rank": 0 if self.up is None else self.up.rank,
            "shape": list(self.weight.shape),
        }

    def map(self, change: Callable[[Tensor], Tensor]) -> Layer:
        """Return a copy with `change` applied to each tensor."""
        cells, core = (None if tensor is None else change(tensor) for tensor in (self.cells, self.core))
        return replace(self, weight=self.weight.map(change), up=_mapped(self.up, change), cells=cells, core=core)


def dense_weight(shared: Input, layer: Layer) -> Tensor:
    """Return what the operators amount to, in original coordinates: fp32, of the weight's shape."""
    dense = dequantize(layer.weight, torch.float32)
    if layer.up is not None and shared.down is not None:
        dense = dense + branch(shared.down, layer)
    return shared.transform.inverse(dense)


def branch(down: Factor, layer: Layer) -> Tensor:
    """Return the low-rank branch of a layer that has one: fp32, of the weight's shape, in transformed coordinates."""
    assert layer.up is not None
    up, low = layer.up.dense(), down.dense()
    if not layer.experts:
        return up @ low
    low = low.view(-1, layer.up.rank, low.shape[1])
    if layer.cells is not None:
        rows, columns = layer.cells.long().unbind(1)
        up, low = up[columns], low[rows]
    return (up if layer.core is None else up @ layer.core.to(torch.float32)) @ low


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' values in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def factor_of(name: str, tensors: dict[str, Tensor], dim: int) -> Factor | None:
    """Return the factor called `name` from tensors by buffer name, or None."""
    return Factor(tensors[name], tensors.get(f"{name}_scale"), dim) if name in tensors else None


def _named(name: str, factor: Factor | None) -> dict[str, Tensor]:
    if factor is None:
        return {}
    return {name: factor.values} if factor.scale is None else {name: factor.values, f"{name}_scale": factor.scale}


def _mapped(factor: Factor | None, change: Callable[[Tensor], Tensor]) -> Factor | None:
    if factor is None:
        return None
    return replace(factor, values=change(factor.values), scale=None if factor.scale is None else change(factor.scale))
