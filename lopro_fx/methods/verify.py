"""Checks of what a method returns, before anything is stored or fed forward."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lopro_fx.errors import CalibrationError
from lopro_fx.kernels.activation.reference import BITS
from lopro_fx.kernels.formats.registry import dequantize, empty, known_format
from lopro_fx.layer import Factor, Input, Layer
from lopro_fx.methods.base import Solved, Unit


def verified(method: str, unit: Unit, solved: Any) -> Solved:
    """The result with tensors that can be stored: contiguous, and none of them that of another layer.

    Raises:
        CalibrationError: names the unit, what is wrong, and what is needed.
    """

    def require(met: bool, wrong: str) -> None:
        if not met:
            raise CalibrationError(f"method '{method}', unit '{unit.name}': {wrong}")

    require(isinstance(solved, Solved), f"solve returned a {type(solved).__name__}, and a Solved is needed")
    names = tuple(layer.name for layer in solved.layers)
    require(
        names == unit.names, f"its layers are {', '.join(names)}; they must be {', '.join(unit.names)}, in this order"
    )
    _input(unit, solved.input, require)
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage._cdata not in seen
        tensor = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage()._cdata)
        return tensor

    layers = []
    for layer, weight in zip(solved.layers, unit.weights, strict=True):
        _layer(layer, solved.input, weight, partial(_of_layer, require, layer.name))
        layers.append(layer.map(own))
    return Solved(solved.input.map(own), tuple(layers))


def _input(unit: Unit, shared: Input, require: Any) -> None:
    width, transform, rounded = unit.in_features, shared.transform, shared.activation
    made = (shared.name, shared.readers, shared.in_features)
    require(made == (unit.name, unit.names, width), f"its input is {made}; unit.input() makes the right one")
    skip, block = transform.skip, transform.block
    fits = 0 <= skip <= width and block > 0 and block & (block - 1) == 0 and (block == 1 or (width - skip) % block == 0)
    require(fits, f"block {block} after {skip} columns: a power of two is needed that divides the rest of {width}")
    if (perm := transform.perm) is not None:
        require(perm.dtype in (torch.int16, torch.int32), f"perm is {perm.dtype}, not int16 or int32")
        order = torch.arange(width, dtype=perm.dtype, device=perm.device)
        whole = perm.shape == order.shape and torch.equal(perm.sort().values, order)
        require(whole, f"perm is no permutation of {width} columns")
    if (signs := transform.signs) is not None:
        need = (-(-width // 8),)
        require(signs.dtype == torch.uint8 and signs.shape == need, f"signs must be uint8 {need}")
    if shared.down is not None:
        _factor("down", shared.down, 0, width, require)
    if rounded is not None:
        fits = rounded.bits in BITS and (rounded.group == -1 or rounded.group > 0)
        require(fits, f"{rounded}: bits must be {' or '.join(map(str, BITS))}, group -1 or more than 0")


def _layer(layer: Layer, shared: Input, weight: Tensor, require: Any) -> None:
    packed, shape = layer.weight, tuple(weight.shape)
    require(layer.input == shared.name, f"its input is '{layer.input}', not '{shared.name}'")
    require(tuple(packed.shape) == shape, f"it is {tuple(packed.shape)}, and its weight {shape}")
    format = known_format(packed.format)
    types = {key: type(value) for key, value in format.spec.items()}
    spec = {key: type(value) for key, value in packed.spec.items()}
    require(spec == types, f"its spec is {dict(packed.spec)}; format '{format.name}' needs {_listed(types)}")
    expected = empty(packed.format, packed.shape, packed.spec).tensors
    have = {name: tuple(tensor.shape) for name, tensor in packed.tensors.items()}
    need = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    require(list(have.items()) == list(need.items()), f"its tensors are {have}; format '{format.name}' needs {need}")
    for name, tensor in packed.tensors.items():
        kinds = tensor.is_floating_point() == expected[name].is_floating_point()
        same = tensor.dtype == expected[name].dtype or (kinds and tensor.is_floating_point())
        require(same, f"'{name}' is {tensor.dtype}, and format '{format.name}' has {expected[name].dtype}")
        require(tensor.device == weight.device, f"'{name}' lies on {tensor.device}, and the unit on {weight.device}")
    dense = dequantize(packed, torch.float32)
    made = (tuple(dense.shape), dense.dtype)
    require(made == (shape, torch.float32), f"format '{format.name}' dequantises it to {made}, not {shape} in fp32")
    require(bool(torch.isfinite(dense).all()), "it holds NaN or infinity")
    require((layer.up is None) == (shared.down is None), "a low-rank branch needs both its down and its up factor")
    if layer.experts and layer.up is not None and shared.down is not None:
        _tiles(layer, layer.up, shared.down, require)
    elif layer.up is not None and shared.down is not None:
        _factor("up", layer.up, 1, shape[0], require)
        ranks = layer.up.rank, shared.down.rank
        require(ranks[0] == ranks[1], f"its up factor has rank {ranks[0]}, and the down factor {ranks[1]}")
    try:
        json.dumps(layer.metrics)
    except TypeError as error:
        require(False, f"its metrics can't be stored as JSON: {error}")


def _factor(name: str, factor: Factor, dim: int, length: int, require: Any) -> None:
    values, scale = factor.values, factor.scale
    require(values.dim() == 2 and factor.dim == dim, f"{name} must be a Factor of two dimensions with dim={dim}")
    require(values.shape[1 - dim] == length, f"{name} is {tuple(values.shape)}, for a side of {length}")
    scaled = scale is not None and scale.shape == (factor.rank,)
    fits = scaled if values.dtype == torch.int8 else values.dtype == torch.float16 and (scale is None or scaled)
    require(fits, f"{name} is {values.dtype}: int8 with a scale a component, or fp16")
    require(bool(torch.isfinite(factor.dense()).all()), f"{name} holds NaN or infinity")


def _tiles(layer: Layer, up: Factor, down: Factor, require: Any) -> None:
    """Require factors of experts that fit their cells."""
    count, rank, cells = layer.experts, up.rank, layer.cells
    shaped = up.dim == -1 and up.values.dim() == 3 and up.values.shape[1] == layer.out_features and rank > 0
    require(shaped, f"up is {tuple(up.values.shape)}; experts need (columns, {layer.out_features}, rank) with dim=-1")
    require(down.rank % rank == 0, f"its up factor has rank {rank}, and the down factor {down.rank} components")
    rows, columns = down.rank // rank, up.values.shape[0]
    scaled = up.scale is not None and up.scale.shape == (columns, rank)
    fits = (
        scaled if up.values.dtype == torch.int8 else up.values.dtype == torch.float16 and (up.scale is None or scaled)
    )
    require(fits, f"up is {up.values.dtype}: int8 with scales ({columns}, {rank}), or fp16")
    require(bool(torch.isfinite(up.dense()).all()), "up holds NaN or infinity")
    if cells is None:
        require((rows, columns) == (count, count), f"without cells, {count} experts need as many factors each")
    else:
        limits = torch.tensor([rows, columns], dtype=torch.int32, device=cells.device)
        placed = cells.dtype == torch.int32 and cells.shape == (count, 2)
        require(
            placed and bool(((cells >= 0) & (cells < limits)).all()), f"cells must be int32 ({count}, 2) in the grid"
        )
    if (core := layer.core) is not None:
        require(
            core.dtype == torch.float16 and core.shape == (count, rank, rank),
            f"core must be fp16 {(count, rank, rank)}",
        )
        require(bool(torch.isfinite(core).all()), "core holds NaN or infinity")


def _of_layer(require: Any, name: str, met: bool, wrong: str) -> None:
    require(met, f"layer '{name}': {wrong}")


def _listed(types: dict[str, type]) -> str:
    return ", ".join(f"{key}: {kind.__name__}" for key, kind in types.items()) or "none"
