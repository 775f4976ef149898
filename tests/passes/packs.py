"""Packed groups with random contents, for passes that do not care how they were solved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx.kernels.packing.format import group_count, pack
from lopro_fx.methods.rotation import as_index, largest_block, random_signs
from lopro_fx.passes.packed import PackedGroup, PackedSite
from lopro_fx.passes.sites import find_sites
from tests.helpers import generator

BITS, GROUP_SIZE = 4, 32


def _factor(shape: tuple[int, int], dim: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8), torch.full((shape[dim],), 1e-3).half()


def packed(
    program: ExportedProgram,
    rank: int = 2,
    rotate: bool = True,
    include: tuple[str, ...] = ("*",),
    keep: bool = True,
    bits: int = BITS,
    group_size: int = GROUP_SIZE,
) -> tuple[dict[str, PackedGroup], dict[str, PackedSite]]:
    """Groups and sites of every Linear of the program, by name."""
    groups, sites, rng = {}, {}, generator()
    for group in find_sites(program, include, keep=keep).groups:
        width, shared = group.in_features, {}
        if rotate:
            shared = {"perm": as_index(torch.randperm(width, generator=rng)), "signs": random_signs(width, rng)}
        if rank:
            shared["down"], shared["down_scale"] = _factor((rank, width), 0, rng)
        members = tuple(site.name for site in group.sites)
        block = largest_block(width, 16) if rotate else 1
        groups[group.name] = PackedGroup(group.name, members, width, block, 0, shared)
        for site in group.sites:
            count = group_count(width, group_size)
            own = {
                "codes": pack(torch.randint(0, 1 << bits, (site.out_features, width), generator=rng), bits),
                "scales": torch.full((site.out_features, count), 0.02).half(),
                "zeros": pack(torch.full((site.out_features * count,), (1 << bits - 1) - 1), bits),
            }
            if rank:
                own["up"], own["up_scale"] = _factor((site.out_features, rank), 1, rng)
            sites[site.name] = PackedSite(
                site.name,
                group.name,
                bits,
                group_size,
                site.out_features,
                width,
                own,
                {"shape": [site.out_features, width]},
            )
    return groups, sites
