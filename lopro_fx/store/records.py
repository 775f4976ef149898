"""Inputs and layers as one flat dict of tensors plus JSON, the unit of every file written.

    inputs  by name: readers, in_features, rotation, rank of the branch, activation, dtypes of tensors
    layers  by name: input, format, shape, spec, dtypes of tensors, metrics, whether embeddings read the weight

Shapes of tensors follow from these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lopro_fx.errors import CheckpointError, GraphError
from lopro_fx.kernels.formats.base import Packed
from lopro_fx.kernels.formats.registry import empty, known_format
from lopro_fx.layer import Activation, Input, Layer, Transform, factor_of
from lopro_fx.passes.fit import require_operands

# (owner's name, tensor's name, shape, dtype's name in torch) to the tensor.
Find = Callable[[str, str, tuple[int, ...], str], Tensor]


def tensors_of(inputs: Iterable[Input], layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Tensors by `<fqn>.<key>`, their names as buffers of a rewritten program."""
    return {f"{owner.name}.{key}": tensor for owner in (*inputs, *layers) for key, tensor in owner.tensors.items()}


def describe(inputs: Iterable[Input], layers: Iterable[Layer]) -> dict[str, Any]:
    """Describe inputs and layers as JSON: everything but the tensors' values."""
    return {
        "inputs": {
            shared.name: {
                "readers": list(shared.readers),
                "in_features": shared.in_features,
                "block": shared.transform.block,
                "skip": shared.transform.skip,
                "rank": 0 if shared.down is None else shared.down.rank,
                "activation": None if shared.activation is None else asdict(shared.activation),
                "tensors": _dtypes(shared.tensors),
            }
            for shared in inputs
        },
        "layers": {
            layer.name: {
                "input": layer.input,
                "format": layer.weight.format,
                "shape": list(layer.weight.shape),
                "spec": dict(layer.weight.spec),
                "tensors": _dtypes(layer.tensors),
                "factors": None if layer.up is None or not layer.experts else list(layer.up.values.shape[::2]),
                "metrics": layer.metrics,
                "embedding": layer.embedding,
            }
            for layer in layers
        },
    }


def timeless(record: Any) -> Any:
    """The record without the seconds that steps took: the same run writes the same bytes."""
    if isinstance(record, Mapping):
        return {key: timeless(value) for key, value in record.items() if key != "seconds"}
    return record


def restore(record: Mapping[str, Any], find: Find) -> tuple[dict[str, Input], dict[str, Layer]]:
    """Inverse of `describe`, with tensors from `find`.

    Raises:
        KeyError: the record lacks an entry, or `find` a tensor.
        ConfigError: a format isn't registered.
        CheckpointError: a permutation is none.
    """
    inputs = {name: _input(name, entry, find) for name, entry in record["inputs"].items()}
    layers = {name: _layer(name, entry, record["inputs"], find) for name, entry in record["layers"].items()}
    return inputs, layers


def among(tensors: Mapping[str, Tensor]) -> Find:
    """Return a `Find` that looks tensors up by the names of `tensors_of`, and wants them as the record says."""

    def find(owner: str, key: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        found = tensors[f"{owner}.{key}"]
        if (tuple(found.shape), found.dtype) != (shape, getattr(torch, dtype)):
            raise CheckpointError(
                f"'{owner}.{key}' is {found.dtype} {tuple(found.shape)}, but its layer has torch.{dtype} {shape}; "
                "save the model again"
            )
        return found

    return find


def on_meta(owner: str, key: str, shape: tuple[int, ...], dtype: str) -> Tensor:  # noqa: ARG001
    """Make a tensor without data, a `Find` for weights that are loaded later."""
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def require_permutation(perm: Tensor, name: str) -> None:
    """Require that a tensor that was read, `name` in the error, permutes columns; one on meta is not looked at.

    Raises:
        CheckpointError: it does not.
    """
    if perm.is_meta:
        return
    ordered = perm.flatten().sort().values.to("cpu", torch.int64)
    columns = torch.arange(perm.numel(), dtype=torch.int64, device="cpu")
    if perm.is_floating_point() or not torch.equal(ordered, columns):
        raise CheckpointError(f"'{name}' is no permutation of {perm.numel()} columns; save the model again")


def require_cells(cells: Tensor, rows: int, columns: int, name: str) -> None:
    """Require that a tensor that was read, `name` in the error, holds places of a grid; one on meta is not looked at.

    Raises:
        CheckpointError: it does not.
    """
    if cells.is_meta or not cells.numel():
        return
    most = cells.amax(0).tolist()
    if cells.dtype != torch.int32 or cells.amin() < 0 or most[0] >= rows or most[1] >= columns:
        raise CheckpointError(f"'{name}' has places outside of a grid of {rows} x {columns}; save the model again")


def from_version_2(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert the record of a state that lopro_fx 0.1 wrote: "affine" weights, ranks and dtypes of the tensors."""

    def stored(entry: Mapping[str, Any]) -> dict[str, str]:
        return _dtypes({key: tensors[f"{entry['name']}.{key}"] for key in entry["tensors"]})

    groups = {
        entry["name"]: {
            "readers": entry["members"],
            "in_features": entry["in_features"],
            "block": entry["block"],
            "skip": entry["skip"],
            "rank": tensors[f"{entry['name']}.down"].shape[0] if "down" in entry["tensors"] else 0,
            "tensors": stored(entry),
        }
        for entry in record["groups"]
    }
    layers = {
        entry["name"]: {
            "input": entry["group"],
            "format": "affine",
            "shape": [entry["out_features"], entry["in_features"]],
            "spec": {"bits": entry["bits"], "group_size": entry["group_size"]},
            "tensors": stored(entry),
            "metrics": entry["row"],
            "embedding": entry["embedding"],
        }
        for entry in record["sites"]
    }
    return {**record, "inputs": groups, "layers": layers}


def _input(name: str, entry: Mapping[str, Any], find: Find) -> Input:
    width, rank = entry["in_features"], entry["rank"]
    shapes = {"perm": (width,), "signs": (-(-width // 8),), "down": (rank, width), "down_scale": (rank,)}
    own = {key: find(name, key, shapes[key], dtype) for key, dtype in entry["tensors"].items()}
    if "perm" in own:
        require_permutation(own["perm"], f"{name}.perm")
    around = {"x": torch.empty(1, width, dtype=torch.float32, device="meta"), "block": entry["block"], **own}
    try:
        require_operands(f"the input of '{name}' is stored", {**around, "skip": entry["skip"]})
    except GraphError as error:
        raise CheckpointError(f"{error}; save the model again") from error
    transform = Transform(own.get("perm"), own.get("signs"), entry["block"], entry["skip"])
    rounded = entry.get("activation")
    activation = None if rounded is None else Activation(**rounded)
    return Input(name, tuple(entry["readers"]), width, transform, factor_of("down", own, 0), activation)


def _layer(name: str, entry: Mapping[str, Any], inputs: Mapping[str, Any], find: Find) -> Layer:
    shape, rank = tuple(entry["shape"]), inputs[entry["input"]]["rank"]
    unfilled = empty(entry["format"], shape, entry["spec"])
    shapes = {key: tuple(tensor.shape) for key, tensor in unfilled.tensors.items()}
    experts = unfilled.experts
    if experts:
        columns, rank = entry["factors"] or (0, 0)
        shapes |= {"up": (columns, shape[1], rank), "up_scale": (columns, rank)}
        shapes |= {"cells": (experts, 2), "core": (experts, rank, rank)}
    else:
        shapes |= {"up": (shape[0], rank), "up_scale": (rank,)}
    own = {key: find(name, key, shapes[key], dtype) for key, dtype in entry["tensors"].items()}
    # JSON is sorted, and operators take a format's numbers in its own order.
    spec = {key: entry["spec"][key] for key in known_format(entry["format"]).spec}
    weight = Packed(entry["format"], shape, spec, {key: own[key] for key in unfilled.tensors})
    up, metrics = factor_of("up", own, -1 if experts else 1), entry.get("metrics", {})
    others = {key: own[key] for key in ("cells", "core") if key in own}
    if up is not None and "cells" in own:
        require_cells(own["cells"], inputs[entry["input"]]["rank"] // rank, columns, f"{name}.cells")
    return Layer(name, entry["input"], weight, up, metrics, bool(entry["embedding"]), **others)


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
