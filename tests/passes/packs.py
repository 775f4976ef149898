"""Packed groups with random contents, for passes that do not care how they were solved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.export import ExportedProgram

from lopro_fx.kernels.formats.affine.packing.format import group_count, pack
from lopro_fx.kernels.formats.affine.rounded import affine
from lopro_fx.kernels.formats.base import Packed
from lopro_fx.kernels.formats.trellis.code import code_words
from lopro_fx.layer import Factor, Input, Layer, Transform
from lopro_fx.methods.rotation import as_index, largest_block, random_signs
from lopro_fx.passes.sites import find_sites
from tests.helpers import generator

BITS, GROUP_SIZE = 4, 32


def _factor(shape: tuple[int, int], dim: int, rng: torch.Generator) -> Factor:
    values = torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8)
    return Factor(values, torch.full((shape[dim],), 1e-3).half(), dim)


def _affine(rows: int, width: int, rng: torch.Generator, bits: int, group_size: int) -> Packed:
    count = group_count(width, group_size)
    codes = pack(torch.randint(0, 1 << bits, (rows, width), generator=rng), bits)
    zeros = pack(torch.full((rows * count,), (1 << bits - 1) - 1), bits)
    return affine(codes, torch.full((rows, count), 0.02).half(), zeros, bits, group_size, width)


def trellis(rows: int, width: int, rng: torch.Generator) -> Packed:
    """A trellis weight: 2 bits, pairs of columns, strips of 32 rows."""
    spec = {"bits": 2.0, "columns": 2, "window": 12, "strip": 32}
    codes = torch.randint(-(2**31), 2**31, (code_words((rows, width), 4, 2, 32),), generator=rng, dtype=torch.int32)
    return Packed("trellis", (rows, width), spec, {"scales": torch.full((rows,), 0.02).half(), "codes": codes})


def packed(
    program: ExportedProgram,
    rank: int = 2,
    rotate: bool = True,
    include: tuple[str, ...] = ("*",),
    keep: bool = True,
    bits: int = BITS,
    group_size: int = GROUP_SIZE,
    weight: Callable[[int, int, torch.Generator], Packed] | None = None,
) -> tuple[dict[str, Input], dict[str, Layer]]:
    """Inputs and layers of every Linear of the program, by name; `weight` of rows, columns, generator, or affine."""
    inputs, layers, rng = {}, {}, generator()
    for group in find_sites(program, include, keep=keep).groups:
        width, transform, down = group.in_features, Transform(), None
        if rotate:
            perm = as_index(torch.randperm(width, generator=rng))
            transform = Transform(perm, random_signs(width, rng), largest_block(width, 16))
        if rank:
            down = _factor((rank, width), 0, rng)
        readers = tuple(site.name for site in group.sites)
        inputs[group.name] = Input(group.name, readers, width, transform, down)
        for site in group.sites:
            rows = site.out_features
            made = weight(rows, width, rng) if weight else _affine(rows, width, rng, bits, group_size)
            up = _factor((rows, rank), 1, rng) if rank else None
            layers[site.name] = Layer(site.name, group.name, made, up, {"shape": [rows, width]})
    return inputs, layers
