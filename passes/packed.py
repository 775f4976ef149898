"""What the rewrite consumes: packed tensors of each site, and those that a group of sites shares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lopro_fx.kernels.packing.format import dequantize
from lopro_fx.kernels.project.reference import dense_factor
from lopro_fx.kernels.rotate.reference import unrotate


@dataclass(frozen=True)
class PackedGroup:
    """Tensors shared by the sites that read one activation.

    `tensors` may hold `perm` int16/int32 (n,), `signs` uint8 (ceil(n/8),), `down` int8/fp16 (rank, n) and `down_scale`
    fp16 (rank,); `block` and `skip` are those of `lopro::rotate`.
    """

    name: str
    members: tuple[str, ...]
    in_features: int
    block: int
    skip: int
    tensors: dict[str, Tensor]

    @property
    def rotates(self) -> bool:
        return self.block > 1 or "perm" in self.tensors

    def to(self, device: torch.device) -> PackedGroup:
        """The same with its tensors on `device`."""
        return replace(self, tensors={key: tensor.to(device) for key, tensor in self.tensors.items()})


@dataclass(frozen=True)
class PackedSite:
    """One Linear: `codes`, `scales`, `zeros` (see `kernels/packing/format.py`), and `up`, `up_scale` if it has a rank.

    `row` is the site's line in the report. With `embedding`, embeddings that share the weight read it packed too.
    """

    name: str
    group: str
    bits: int
    group_size: int
    out_features: int
    in_features: int
    tensors: dict[str, Tensor]
    row: dict[str, Any] = field(default_factory=dict)
    embedding: bool = False

    def to(self, device: torch.device) -> PackedSite:
        """The same with its tensors on `device`."""
        return replace(self, tensors={key: tensor.to(device) for key, tensor in self.tensors.items()})

    @property
    def facts(self) -> dict[str, Any]:
        """The part of `row` that follows from the tensors."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "rank": self.tensors["up"].shape[1] if "up" in self.tensors else 0,
            "shape": [self.out_features, self.in_features],
        }


def dense_weight(group: PackedGroup, site: PackedSite) -> Tensor:
    """fp32 (out_features, in_features) in the original coordinates: what the operators compute with, as one matrix."""
    own, shared = site.tensors, group.tensors
    dense = dequantize(
        own["codes"], own["scales"], own["zeros"], site.bits, site.group_size, site.in_features, torch.float32
    )
    if "up" in own:
        up = dense_factor(own["up"], own.get("up_scale"), 1)
        dense = dense + up @ dense_factor(shared["down"], shared.get("down_scale"), 0)
    return unrotate(dense, shared.get("perm"), shared.get("signs"), group.block, group.skip)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' values, as they stand in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
