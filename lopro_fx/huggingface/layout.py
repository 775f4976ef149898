"""The part of a quantised state that its tensors don't tell, as the JSON that stands in `config.json`.

    groups  by name, which is that of the Linear whose module holds what they share: block and skip of the rotation,
            rank, dtype of the factors, and whether there are a permutation and signs
    sites   by name: the group, bits, group_size, the embedding that holds the tensors, if one does, and others that
            read them too

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

_FACTORS = {"int8": torch.int8, "float16": torch.float16}


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
        tensors = _site_tensors(entry["bits"], entry["group_size"], rows, width)
        tensors |= _factor("up", (rows, group["rank"]), group)
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
        "factors": None if down is None else str(down.dtype).removeprefix("torch."),
        "perm": "perm" in group.tensors,
        "signs": "signs" in group.tensors,
    }


def _group_tensors(entry: Mapping[str, Any], width: int) -> dict[str, Tensor]:
    tensors = {}
    if entry["perm"]:
        tensors["perm"] = as_index(_meta(width, torch.int32))
    if entry["signs"]:
        tensors["signs"] = _meta(-(-width // 8), torch.uint8)
    return tensors | _factor("down", (entry["rank"], width), entry)


def _site_tensors(bits: int, group_size: int, rows: int, width: int) -> dict[str, Tensor]:
    count = group_count(width, group_size)
    return {
        "codes": _meta((rows, packed_words(width, bits)), torch.int32),
        "scales": _meta((rows, count), torch.float16),
        "zeros": _meta(packed_words(rows * count, bits), torch.int32),
    }


def _factor(key: str, shape: tuple[int, int], group: Mapping[str, Any]) -> dict[str, Tensor]:
    if group["factors"] is None:
        return {}
    scale = {} if group["factors"] == "float16" else {f"{key}_scale": _meta(group["rank"], torch.float16)}
    return {key: _meta(shape, _FACTORS[group["factors"]]), **scale}


def _meta(shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
