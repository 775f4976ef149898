"""The part of a quantised state that its tensors don't tell, as the JSON that stands in `config.json`.

    groups  by name, which is that of the Linear whose module holds what they share: block and skip of the rotation,
            rank, dtypes of the factors and of the down factor's scales (null for none), and whether there are a
            permutation and signs
    sites   by name: the group, bits, group_size, dtypes of the scales and of the up factor's scales (null for none),
            the embedding that holds the tensors, if one does, and others that read them too

Shapes follow from these and from the sizes of the Linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lopro_fx.kernels.packing.format import group_count, packed_words
from lopro_fx.methods.rotation import as_index
from lopro_fx.passes.packed import PackedGroup, PackedSite
from lopro_fx.state import QuantState

_DTYPES = {"int8": torch.int8, "float16": torch.float16, "float32": torch.float32}


def describe(state: QuantState, embeddings: Mapping[str, Sequence[str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON of every group and of every site, by name: what `restore` reads.

    Args:
        state: what to describe.
        embeddings: names of the embeddings that read a site's weight, by the site's name; the first holds it.
    """
    groups = {name: _group(group) for name, group in state.groups.items()}
    sites = {
        name: {
            "group": site.group,
            "bits": site.bits,
            "group_size": site.group_size,
            "scales": _dtype(site.tensors["scales"]),
            "up_scale": _dtype(site.tensors.get("up_scale")),
            "embedding": next(iter(embeddings.get(name, ())), None),
            "readers": list(embeddings.get(name, ())[1:]),
        }
        for name, site in state.sites.items()
    }
    return groups, sites


def restore(
    groups: Mapping[str, Any], sites: Mapping[str, Any], size: Callable[[str], tuple[int, int]]
) -> tuple[list[PackedGroup], dict[str, PackedSite]]:
    """Groups and sites of a description, their tensors on the meta device.

    Args:
        groups, sites: what `describe` gave.
        size: (out_features, in_features) of a Linear by name.

    Raises:
        KeyError: an entry is missing.
    """
    made = {}
    for name, entry in sites.items():
        group, (rows, width) = groups[entry["group"]], size(name)
        tensors = _site_tensors(entry, rows, width)
        tensors |= _factor("up", (rows, group["rank"]), group, entry.get("up_scale", _scale_before(group)))
        sizes = entry["bits"], entry["group_size"], rows, width
        made[name] = PackedSite(name, entry["group"], *sizes, tensors, embedding=entry["embedding"] is not None)
    members: dict[str, list[str]] = {}
    for site in made.values():
        members.setdefault(site.group, []).append(site.name)
    packed = []
    for name, sites_of_it in members.items():
        entry, width = groups[name], made[sites_of_it[0]].in_features
        tensors = _group_tensors(entry, width)
        packed.append(PackedGroup(name, tuple(sites_of_it), width, entry["block"], entry["skip"], tensors))
    return packed, made


def _group(group: PackedGroup) -> dict[str, Any]:
    down = group.tensors.get("down")
    return {
        "block": group.block,
        "skip": group.skip,
        "rank": 0 if down is None else down.shape[0],
        "factors": _dtype(down),
        "down_scale": _dtype(group.tensors.get("down_scale")),
        "perm": "perm" in group.tensors,
        "signs": "signs" in group.tensors,
    }


def _group_tensors(entry: Mapping[str, Any], width: int) -> dict[str, Tensor]:
    tensors = {}
    if entry["perm"]:
        tensors["perm"] = as_index(_meta(width, torch.int32))
    if entry["signs"]:
        tensors["signs"] = _meta(-(-width // 8), torch.uint8)
    return tensors | _factor("down", (entry["rank"], width), entry, entry.get("down_scale", _scale_before(entry)))


def _site_tensors(entry: Mapping[str, Any], rows: int, width: int) -> dict[str, Tensor]:
    bits, count = entry["bits"], group_count(width, entry["group_size"])
    return {
        "codes": _meta((rows, packed_words(width, bits)), torch.int32),
        "scales": _meta((rows, count), _DTYPES[entry.get("scales", "float16")]),
        "zeros": _meta(packed_words(rows * count, bits), torch.int32),
    }


def _factor(key: str, shape: tuple[int, int], group: Mapping[str, Any], scale: str | None) -> dict[str, Tensor]:
    if group["factors"] is None:
        return {}
    scales = {} if scale is None else {f"{key}_scale": _meta(group["rank"], _DTYPES[scale])}
    return {key: _meta(shape, _DTYPES[group["factors"]]), **scales}


def _scale_before(group: Mapping[str, Any]) -> str | None:
    """Type of a factor's scales in folders that don't name it, which the first versions wrote."""
    return "float16" if group["factors"] == "int8" else None


def _dtype(tensor: Tensor | None) -> str | None:
    return None if tensor is None else str(tensor.dtype).removeprefix("torch.")


def _meta(shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
