"""Turn a group's solution into the packed tensors that the graph will hold."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels.packing.format import pack
from lopro_fx.methods.lowrank import Factor
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.methods.units import stored_factor_scale, stored_scales
from lopro_fx.passes.packed import PackedGroup, PackedSite, stored_bytes
from lopro_fx.passes.sites import Group

_ROWS = 8192


def pack_solution(
    group: Group, solution: GroupSolution, method: str, bits: int
) -> tuple[PackedGroup, list[PackedSite]]:
    """Packed tensors of a group and of each of its sites, in the order of `group.sites`."""
    transform, rounded = solution.transform, solution.rounded
    shared = _named({"perm": transform.perm, "signs": transform.signs}) | _factor("down", solution.down)
    packed_group = PackedGroup(
        group.name, tuple(site.name for site in group.sites), group.in_features, transform.block, transform.skip, shared
    )
    rows = [site.out_features for site in group.sites]
    parts = zip(rounded.codes.split(rows), rounded.scales.split(rows), rounded.zeros.split(rows), strict=True)
    sites = []
    for index, (site, (codes, scales, zeros)) in enumerate(zip(group.sites, parts, strict=True)):
        tensors = {
            # Packing takes many times the codes' memory, and an output projection has the vocabulary's rows.
            "codes": torch.cat([pack(part, bits) for part in codes.split(_ROWS)]),
            "scales": stored_scales(scales, bits).contiguous(),
            "zeros": pack(zeros.flatten(), bits),
            **_factor("up", solution.ups[index] if solution.ups else None),
        }
        own = stored_bytes(tensors.values())
        share = stored_bytes(shared.values()) * site.out_features / sum(rows)
        row = {
            "method": method,
            "bits": bits,
            "group_size": rounded.group_size,
            "rank": 0 if solution.down is None else solution.down.values.shape[0],
            "shape": [site.out_features, site.in_features],
            "transform": solution.choice,
            "bits_per_weight": 8 * (own + share) / (site.out_features * site.in_features),
            "relative_loss": solution.relative,
            "damp": solution.damp,
        }
        sites.append(
            PackedSite(
                site.name, group.name, bits, rounded.group_size, site.out_features, site.in_features, tensors, row
            )
        )
    return packed_group, sites


def _named(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}


def _factor(name: str, factor: Factor | None) -> dict[str, Tensor]:
    if factor is None:
        return {}
    scale = None if factor.scale is None else stored_factor_scale(factor.scale)
    return _named({name: factor.values, f"{name}_scale": scale})
