"""Whether the operands of our operators fit each other, by the shapes and dtypes that a graph records.

Definitions in ATen check what they read, but kernels for GPUs take sizes from one operand and addresses from others.
A program from elsewhere is checked once, where it enters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.kernels.formats.base import Format
from lopro_fx.kernels.formats.registry import OPERATORS, empty
from lopro_fx.passes.operands import operands

# A shape, where None is any number.
_Shape = tuple[int | None, ...]
_ACTIVATIONS = ("latent", "gate", "residual")
_FACTORS = (torch.int8, torch.float16, torch.bfloat16, torch.float32)
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "perm": (torch.int16, torch.int32),
    "signs": (torch.uint8,),
    "cells": (torch.int32,),
    "ids": (torch.int64, torch.int32),
    "down": _FACTORS,
    "up": _FACTORS,
}


def require_fit(node: Node) -> None:
    """Require that the operands of a call of one of our operators fit each other.

    Raises:
        GraphError: says which one doesn't, and what would.
    """
    named = {name: value.meta.get("val") if isinstance(value, Node) else value
             for name, value in operands(node).named.items()}  # fmt: skip
    owner = OPERATORS.get(node.target)  # pyright: ignore[reportArgumentType]
    require_operands(f"'{node.name}' calls {node.target}", named, None if owner is None else owner[0])


def require_operands(what: str, named: Mapping[str, Any], format: Format | None = None) -> None:
    """Require that operands by name, of an operator of `format` or of one that is none of a format's, fit each other.

    Raises:
        GraphError: says which one of `what` doesn't, and what would.
    """
    try:
        for name, reason in _misfits(named, format):
            given = named[name]
            found = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
            raise GraphError(f"{what} with {name} {found}, not {reason}")
    except GraphError:
        raise
    # A format's own code, given numbers that are none of its.
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise GraphError(f"{what} with operands that don't fit it: {error}") from error


def _misfits(named: Mapping[str, Any], format: Format | None) -> Iterator[tuple[str, str]]:
    """Names of operands that don't fit, and what would."""
    x = named.get("x")
    width = x.shape[-1] if isinstance(x, Tensor) and x.dim() else named.get("in_features")
    if not isinstance(width, int) or width < 1:
        yield ("x" if "x" in named else "in_features"), "of a known width"
        return
    yield from _numbers(named, width)
    shapes = _around(named, width)
    if format is not None:
        first = named[format.tensor_names[0]]
        lead = tuple(first.shape[: 2 if "slots" in named else 1])
        if not lead or 0 in lead:
            yield format.tensor_names[0], "with a row for each output feature"
            return
        packed = empty(format.name, (*lead, width), {key: named[key] for key in format.spec})
        for name, tensor in packed.tensors.items():
            shapes[name] = tuple(tensor.shape)
            # Scales may be stored wider or narrower than usual.
            if named[name].dtype != tensor.dtype and not (
                named[name].is_floating_point() and tensor.is_floating_point()
            ):
                yield name, f"of {tensor.dtype}"
        shapes |= _branch(named, lead, width)
    for name, shape in shapes.items():
        value = named.get(name)
        if value is None:
            continue
        # Leading sizes of an activation are free, and may be symbols.
        found = tuple(value.shape[-len(shape) :] if name in _ACTIVATIONS else value.shape)
        if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape, strict=True)):
            yield name, f"of shape ({', '.join('any' if size is None else str(size) for size in shape)})"


def _around(named: Mapping[str, Any], width: int) -> dict[str, _Shape]:
    """Shapes of what stands around a packed weight."""
    shapes: dict[str, _Shape] = {"perm": (width,), "signs": (-(-width // 8),), "norm": (width,), "gate": (width,)}
    if isinstance(down := named.get("down"), Tensor):
        shapes |= {"down": (None, width), "down_scale": (down.shape[0],), "scale": (down.shape[0],)}
    if "slots" in named:
        shapes |= {"x": (None, width), "ids": (None,)}
    return shapes


def _branch(named: Mapping[str, Any], lead: tuple[int, ...], width: int) -> dict[str, _Shape]:
    """Shapes of bias, residual and low-rank factors of a weight with `lead` rows, or experts and rows."""
    rows, up, scale = lead[-1], named.get("up"), named.get("up_scale")
    shapes: dict[str, _Shape] = {"bias": (rows,), "residual": (rows,)}
    if not isinstance(up, Tensor) or not up.dim():
        return shapes
    rank, lows = up.shape[-1], named.get("latent") if named.get("down") is None else named["down"].mT
    if len(lead) == 1:
        # Merged Linears have scales of their own.
        parts = scale.shape[0] if isinstance(scale, Tensor) and scale.dim() == 2 else 0
        own = (parts, rank) if parts and rows % parts == 0 else (rank,)
        return {**shapes, "up": (rows, rank), "up_scale": own, "latent": (rank,), "down": (rank, width)}
    columns = lead[0] if named.get("cells") is None else up.shape[0]
    own = {"up": (columns, rows, rank), "up_scale": (columns, rank)}
    if isinstance(lows, Tensor) and (rank < 1 or lows.shape[-1] % rank):
        own["up"] = (columns, rows, lows.shape[-1])
    return {**shapes, **own, "cells": (lead[0], 2), "core": (lead[0], rank, rank)}


def _numbers(named: Mapping[str, Any], width: int) -> Iterator[tuple[str, str]]:
    """Numbers and dtypes that fit no size."""
    block, skip, slots = named.get("block", 1), named.get("skip", 0), named.get("slots", 1)
    for name in ("block", "skip", "slots"):
        if type(named.get(name, 1)) is not int:
            yield name, "a whole number"
            return
    if not 0 <= skip <= width:
        yield "skip", f"a number of {width} columns"
    if block < 1 or block & (block - 1) or (width - skip) % block:
        yield "block", f"a power of two that divides {width - skip} columns"
    if slots < 1:
        yield "slots", "positive"
    for name, allowed in _DTYPES.items():
        value = named.get(name)
        if isinstance(value, Tensor) and value.dtype not in allowed:
            yield name, f"of {' or '.join(map(str, allowed))}"
