"""A packed group and its sites as one flat dict of tensors plus JSON, the unit of every file written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lopro_fx.passes.packed import PackedGroup, PackedSite


def tensors_of(groups: Iterable[PackedGroup], sites: Iterable[PackedSite]) -> dict[str, Tensor]:
    """Tensors by `<fqn>.<key>`, the names that they have as buffers of a rewritten program."""
    return {f"{owner.name}.{key}": tensor for owner in (*groups, *sites) for key, tensor in owner.tensors.items()}


def describe(groups: Iterable[PackedGroup], sites: Iterable[PackedSite]) -> dict[str, Any]:
    """JSON record of everything but the tensors, which it lists by key."""

    def entry(owner: PackedGroup | PackedSite) -> dict[str, Any]:
        return {**asdict(_without_tensors(owner)), "tensors": sorted(owner.tensors)}

    return {"groups": [entry(group) for group in groups], "sites": [entry(site) for site in sites]}


def restore(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[list[PackedGroup], list[PackedSite]]:
    """Inverse of `describe` and `tensors_of`.

    Raises:
        KeyError: a tensor is missing.
    """

    def own(entry: Mapping[str, Any]) -> dict[str, Tensor]:
        return {key: tensors[f"{entry['name']}.{key}"] for key in entry["tensors"]}

    groups = [PackedGroup(**{**entry, "members": tuple(entry["members"]), "tensors": own(entry)})
              for entry in record["groups"]]  # fmt: skip
    sites = [PackedSite(**{**entry, "tensors": own(entry)}) for entry in record["sites"]]
    return groups, sites


def _without_tensors(owner: PackedGroup | PackedSite) -> Any:
    # asdict deep-copies tensors, so they are taken out first.
    return type(owner)(**{**vars(owner), "tensors": {}})
