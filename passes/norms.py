"""Find RMS norms in a graph, as one operator or spelled out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

aten = torch.ops.aten

_CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default})


class Norm(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * (weight + shift) over the last dimension, computed by the nodes in `inside`."""

    x: Node
    weight: Node
    shift: float
    eps: float
    inside: set[Node]


def match_norm(node: Node) -> Norm | None:
    """Match `node` as the result of an RMS norm whose `weight` is a placeholder; look through casts."""
    inside: set[Node] = set()
    top = _uncast(node, inside)
    if top.target is aten.rms_norm.default:
        x, shape, weight, eps = (*top.args, None, None)[:4]
        inside.add(top)
        if not isinstance(weight, Node) or not isinstance(eps, float) or shape != [_node(x).meta["val"].shape[-1]]:
            return None
        return _checked(Norm(_node(x), weight, 0.0, eps, inside))
    for scaled, weight in _factors(top):
        around = {*inside, top}
        scaled, weight = _uncast(scaled, around), _uncast(weight, around)
        norm = _normalised(scaled, weight, {*around, scaled}, node.meta["val"].dtype)
        if norm is not None:
            return _checked(norm)
    return None


def _normalised(scaled: Node, weight: Node, inside: set[Node], dtype: torch.dtype) -> Norm | None:
    """Match `scaled` as x * rsqrt(mean(x * x) + eps), which a norm multiplies by its weight."""
    shift = 0.0
    if weight.target is aten.add.Tensor and isinstance(weight.args[1], (int, float)):
        inside.add(weight)
        shift, weight = float(weight.args[1]), _uncast(_node(weight.args[0]), inside)
    for wide, root in _factors(scaled):
        around = set(inside)
        root = _uncast(root, around)
        if root.target is not aten.rsqrt.default:
            continue
        shifted = _node(root.args[0])
        mean = _node(shifted.args[0]) if shifted.target is aten.add.Tensor else shifted
        eps = shifted.args[1] if shifted.target is aten.add.Tensor else None
        if mean.target is not aten.mean.dim or not isinstance(eps, float) or not _keeps_last(mean):
            continue
        square = _node(mean.args[0])
        around |= {root, shifted, mean, square}
        x = _uncast(wide, around, dtype)
        if all(factor is not None and _uncast(factor, around, dtype) is x for factor in _squared(square)):
            return Norm(x, weight, shift, eps, around)
    return None


def _checked(norm: Norm) -> Norm | None:
    """The norm if the program stores its weight, one number per column; else None."""
    weight = norm.weight.meta["val"]
    held = norm.weight.op == "placeholder" and isinstance(weight, torch.Tensor)
    return norm if held and tuple(weight.shape) == (norm.x.meta["val"].shape[-1],) else None


def _uncast(node: Node, inside: set[Node], dtype: torch.dtype | None = None) -> Node:
    """Strip casts from `node`; stop at the first value of `dtype`. Stripped casts are added to `inside`."""
    while node.target in _CASTS and node.meta["val"].dtype != dtype:
        inside.add(node)
        node = _node(node.args[0])
    return node


def _factors(node: Node) -> list[tuple[Node, Node]]:
    """Both orders of a product's factors."""
    if node.target is not aten.mul.Tensor or not all(isinstance(factor, Node) for factor in node.args):
        return []
    left, right = (_node(factor) for factor in node.args)
    return [(left, right), (right, left)]


def _squared(node: Node) -> tuple[Node | None, ...]:
    """The factors of a square or product; (None,) if `node` is neither."""
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return (_node(node.args[0]),)
    return next(iter(_factors(node)), (None,))


def _keeps_last(mean: Node) -> bool:
    """Whether a mean reduces the last dimension and keeps it with size 1."""
    dims, keeps, *_ = (*mean.args[1:], False)
    last = _node(mean.args[0]).meta["val"].dim() - 1
    return dims in ([-1], [last]) and bool(keeps)


def _node(value: Any) -> Node:
    assert isinstance(value, Node)
    return value
