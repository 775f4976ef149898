"""A format and methods that nothing else knows: what a newcomer writes. Importing this registers them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lopro_fx.kernels.formats.base import Format, Packed
from lopro_fx.kernels.formats.registry import FORMATS, register_format
from lopro_fx.layer import Layer
from lopro_fx.methods.base import Method, Solved
from lopro_fx.methods.observers import Gram, Magnitude
from lopro_fx.methods.registry import METHODS, register_method


class Sign(Format):
    """One bit a weight and a scale a row: weight = scale * (2 bit - 1)."""

    name = "sign"

    def empty(self, shape: tuple[int, int], spec: Any) -> Packed:
        rows, columns = shape
        bits = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device="meta")
        return Packed(self.name, shape, spec, {"bits": bits, "size": torch.empty(rows, device="meta")})

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        bits, size = packed.tensors["bits"], packed.tensors["size"]
        places = torch.arange(8, dtype=torch.uint8, device=bits.device)
        signs = (bits.unsqueeze(-1) >> places & 1).flatten(1)[:, : packed.shape[1]].to(dtype)
        return (2 * signs - 1) * size.to(dtype).unsqueeze(1)


def packed_signs(weight: Tensor) -> Packed:
    padded = torch.nn.functional.pad((weight > 0).to(torch.uint8), (0, -weight.shape[1] % 8)).unflatten(1, (-1, 8))
    bits = (padded << torch.arange(8, dtype=torch.uint8, device=weight.device)).sum(-1, dtype=torch.uint8)
    shape = (weight.shape[0], weight.shape[1])
    return Packed("sign", shape, {}, {"bits": bits, "size": weight.abs().float().mean(1)})


@dataclass(frozen=True, kw_only=True)
class Signs(Method):
    """One bit a weight."""

    name = "signs"

    def solve(self, unit, seen, context) -> Solved:
        layers = [Layer(n, unit.name, packed_signs(w)) for n, w in zip(unit.names, unit.weights, strict=True)]
        return Solved(unit.input(), tuple(layers))


class Exact(Format):
    """The weight itself, for tests of what stands around it."""

    name = "exact"

    def empty(self, shape: tuple[int, int], spec: Any) -> Packed:
        return Packed(self.name, shape, spec, {"values": torch.empty(shape, device="meta")})

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return packed.tensors["values"].to(dtype)


@dataclass(frozen=True, kw_only=True)
class Multiplied(Method):
    """Every weight times `factor`; keeps what it was given."""

    name = "multiplied"
    factor: float = 1.0
    given: dict[str, Any] = field(default_factory=dict)

    def observers(self):
        return Gram(), Magnitude()

    def solve(self, unit, seen, context) -> Solved:
        self.given[unit.name] = seen
        weights = [Packed("exact", tuple(weight.shape), {}, {"values": weight.detach() * self.factor})
                   for weight in unit.weights]  # fmt: skip
        layers = [Layer(name, unit.name, weight) for name, weight in zip(unit.names, weights, strict=True)]
        return Solved(unit.input(), tuple(layers))


# Test modules are imported anew by each that asks for them.
for _format in (Sign(), Exact()):
    if _format.name not in FORMATS:
        register_format(_format)
for _method in (Signs, Multiplied):
    if _method.name not in METHODS:
        register_method(_method)
