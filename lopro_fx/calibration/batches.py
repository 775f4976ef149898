"""Calibration batches: flatten what the user passes and check it against the program's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from lopro_fx.errors import CalibrationError
from lopro_fx.passes.lookups import size_ranges, user_placeholders


def flatten_batches(
    program: ExportedProgram, batches: Iterable[Any], device: torch.device | None = None
) -> list[list[Any]]:
    """Flatten each batch to the program's user inputs, in placeholder order, on `device` if one is named.

    Args:
        program: the program to calibrate.
        batches: each item a tensor, a tuple or list of positional inputs, a mapping of keyword inputs, or a pair
            `(args, kwargs)`.

    Raises:
        CalibrationError: no batch, or one whose structure, dtype or shape the program does not take.
    """
    placeholders = user_placeholders(program)
    spec = program.call_spec.in_spec
    flat = []
    for index, batch in enumerate(batches):
        args, kwargs = _normalise(batch)
        if spec is not None and len(spec.children()) == 2:
            kwargs = _reordered(spec.children()[1], kwargs, index)
        values, actual = pytree.tree_flatten((args, kwargs))
        if spec is not None and actual != spec:
            raise CalibrationError(
                f"calibration batch {index} has the structure {_line(actual)}; the program takes {_line(spec)}"
            )
        for node, value in zip(placeholders, values, strict=True):
            _check(program, node, value, index)
        flat.append([value.to(device) if device and isinstance(value, torch.Tensor) else value for value in values])
    if not flat:
        raise CalibrationError("calibration holds no batch; pass at least one, or calibration=None for a data-free run")
    return flat


def _normalise(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    batch = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], dict):
        return tuple(batch[0]), batch[1]
    return batch, {}


def _line(spec: pytree.TreeSpec) -> str:
    return " ".join(str(spec).split())


def _reordered(spec: pytree.TreeSpec, kwargs: dict[str, Any], index: int) -> dict[str, Any]:
    """Put keyword inputs in the order of the export; a dict's order is part of its pytree structure."""
    names = list(spec.context or [])
    if set(names) != set(kwargs):
        raise CalibrationError(
            f"calibration batch {index} has the keyword inputs {sorted(kwargs)}; the program takes {sorted(names)}"
        )
    return {name: kwargs[name] for name in names}


def _check(program: ExportedProgram, node: Node, value: Any, index: int) -> None:
    expected = node.meta.get("val")
    where = f"calibration batch {index}, input '{node.name}'"
    if not isinstance(expected, torch.Tensor):
        return
    if not isinstance(value, torch.Tensor):
        raise CalibrationError(f"{where}: got {type(value).__name__}, expected a tensor of {tuple(expected.shape)}")
    if value.dtype != expected.dtype:
        raise CalibrationError(f"{where}: dtype {value.dtype}, expected {expected.dtype}")
    fits = value.dim() == expected.dim() and all(
        not isinstance(want, int) or have == want for have, want in zip(value.shape, expected.shape, strict=True)
    )
    if not fits:
        raise CalibrationError(f"{where}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    # Node by node, the graph would run on sizes that it was not traced for, and compute something else.
    for dim, (size, (low, high)) in enumerate(zip(value.shape, size_ranges(program, node), strict=True)):
        if not low <= size <= high:
            raise CalibrationError(
                f"{where}: its dimension {dim} is {size}; the program was exported for {max(low, 1):g} to {high:g}"
            )
