"""Experts of a layer from solutions of each one: what they share, and their stacked tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError
from lopro_fx.kernels.formats.packed import stacked as stacked_weights
from lopro_fx.layer import Factor, Layer, Transform
from lopro_fx.methods.base import Context, Method, Solved, Unit
from lopro_fx.methods.observers import Statistics


def solve_experts(method: Method, unit: Unit, seen: Statistics, context: Context) -> Solved:
    """Quantise the experts that read one input.

    Raises:
        ConfigError: the method gives them different transforms, and they read one tensor.
    """
    found = method.solve_experts(unit, seen, context)
    if found is not None:
        return found
    return stacked(unit, [method.solve(unit.expert(index), own, context) for index, own in enumerate(seen.experts)])


def sampled(unit: Unit) -> Tensor:
    """Rows fp32 (about m, n) of all experts alike, for what is chosen for all of them: as many as one expert has."""
    return torch.cat([rows[:: unit.experts].to(torch.float32) for weight in unit.weights for rows in weight])


def stacked(unit: Unit, solved: Sequence[Solved]) -> Solved:
    """Join the solutions of experts, in order.

    Each keeps its low-rank branch; where ranks differ, the smaller ones are filled with zeros, which are stored.

    Raises:
        ConfigError: their transforms or activations differ.
    """
    first = solved[0].input
    for other in solved[1:]:
        if not same_transform(first.transform, other.input.transform) or other.input.activation != first.activation:
            raise ConfigError(f"'{unit.name}': its experts read one tensor, and were given different transforms")
    downs = [each.input.down for each in solved]
    rank = max((0 if down is None else down.rank for down in downs), default=0)
    down = None
    if rank:
        down = _joined([_filled(factor, rank, first.in_features, 0) for factor in downs], 0)
        down = replace(
            down, values=down.values.flatten(0, 1), scale=None if down.scale is None else down.scale.flatten()
        )
    layers = []
    for parts in zip(*(each.layers for each in solved), strict=True):
        ups = [_filled(part.up, rank, part.out_features, 1) for part in parts]
        layers.append(Layer(
            parts[0].name, unit.name, stacked_weights([part.weight for part in parts]),
            _joined(ups, -1) if rank else None, _mean([part.metrics for part in parts]),
        ))  # fmt: skip
    return Solved(replace(first, down=down), tuple(layers))


def same_transform(left: Transform, right: Transform) -> bool:
    """Whether two transforms are equal."""
    pairs = ((left.perm, right.perm), (left.signs, right.signs))
    same = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
    return same and (left.block, left.skip) == (right.block, right.skip)


def _filled(factor: Factor | None, rank: int, length: int, dim: int) -> Factor:
    """A factor of `rank` components, zeros after its own; `length` is its other side."""
    if factor is None:
        shape = (0, length) if dim == 0 else (length, 0)
        values = torch.empty(shape, dtype=torch.int8, device="cpu")
        factor = Factor(values, torch.empty(0, dtype=torch.float16, device="cpu"), dim)
    missing = rank - factor.rank
    if not missing:
        return factor
    pad = (0, 0, 0, missing) if dim == 0 else (0, missing)
    values = torch.nn.functional.pad(factor.values, pad)
    scale = None if factor.scale is None else torch.nn.functional.pad(factor.scale, (0, missing))
    return Factor(values, scale, dim)


def _joined(factors: Sequence[Factor], dim: int) -> Factor:
    scales = [factor.scale for factor in factors if factor.scale is not None]
    dtype = functools.reduce(torch.promote_types, (scale.dtype for scale in scales), torch.float16)
    device = max((factor.values.device for factor in factors), key=lambda device: device.type != "cpu")
    values = torch.stack([factor.values.to(device) for factor in factors])
    return Factor(values, torch.stack([scale.to(device, dtype) for scale in scales]) if scales else None, dim)


def _mean(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of all: means of losses, the largest damping, and what they have in common."""
    common = {key: value for key, value in metrics[0].items() if all(other.get(key) == value for other in metrics)}
    losses = [own["relative_loss"] for own in metrics if "relative_loss" in own]
    if losses:
        common["relative_loss"] = sum(losses) / len(losses)
    damps = [own["damp"] for own in metrics if "damp" in own]
    return common | ({"damp": max(damps)} if damps else {})
