"""The format "affine": see `packing/format.py` for its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.cpu.aoti import inductor_options
from lopro_fx.kernels.formats.affine.cpu_site.reference import activation_group
from lopro_fx.kernels.formats.affine.experts.op import packed_experts, packed_experts_site
from lopro_fx.kernels.formats.affine.linear.op import packed_linear
from lopro_fx.kernels.formats.affine.packing.format import (
    dequantize,
    group_count,
    pack,
    packed_words,
    scaled,
    unpack,
    unpack_at,
)
from lopro_fx.kernels.formats.affine.quantizer import AffineQuantizer
from lopro_fx.kernels.formats.affine.site.op import packed_site
from lopro_fx.kernels.formats.base import Format, Kernel, Packed, Scalar
from lopro_fx.kernels.routed.choice import refuses


class Affine(Format):
    """weight = scale * (code - zero): codes of `bits` bits (2, 3, 4, 8), a scale and zero per `group_size` columns
    (-1: the whole row)."""

    name: ClassVar[str] = "affine"
    spec: ClassVar[Mapping[str, Scalar]] = {"bits": 3, "group_size": 64}
    operators: ClassVar[Mapping[str, str]] = {"cpu": "cpu_site", "int8": "packed_int8", "cpu_experts": "cpu_experts"}
    quantizer = AffineQuantizer

    @property
    def prefix(self) -> str:
        # Stored programs hold operators with this prefix.
        return "packed"

    def empty(self, shape: tuple[int, ...], spec: Mapping[str, Any]) -> Packed:
        (rows, columns), bits = shape, spec["bits"]
        groups = group_count(columns, spec["group_size"])
        tensors = {
            "codes": torch.empty(rows, packed_words(columns, bits), dtype=torch.int32, device="meta"),
            "scales": torch.empty(rows, groups, dtype=torch.float16, device="meta"),
            "zeros": torch.empty(packed_words(rows * groups, bits), dtype=torch.int32, device="meta"),
        }
        return Packed(self.name, shape, {key: spec[key] for key in self.spec}, tensors)

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        own, bits, size = packed.tensors, _whole(packed, "bits"), _whole(packed, "group_size")
        return dequantize(own["codes"], own["scales"], own["zeros"], bits, size, packed.shape[1], dtype)

    def lookup(self, packed: Packed, ids: Tensor, dtype: torch.dtype) -> Tensor:
        own, bits, size = packed.tensors, _whole(packed, "bits"), _whole(packed, "group_size")
        groups = own["scales"].shape[1]
        places = ids.unsqueeze(-1) * groups + torch.arange(groups, device=ids.device, dtype=torch.int64)
        rows = unpack(embedding(ids, own["codes"]), bits, packed.shape[1])
        return scaled(rows, embedding(ids, own["scales"]), unpack_at(own["zeros"], bits, places), size, dtype)

    def cat(self, parts: Sequence[Packed]) -> Packed | str:
        zeros = torch.cat([_zeros(part).flatten() for part in parts])
        joined = {name: torch.cat([part.tensors[name] for part in parts]) for name in ("codes", "scales")}
        tensors = {**joined, "zeros": pack(zeros, _whole(parts[0], "bits"))}
        rows = sum(part.shape[0] for part in parts)
        return replace(parts[0], shape=(rows, parts[0].shape[1]), tensors=tensors)

    def permute_rows(self, packed: Packed, order: Tensor) -> Packed | str:
        own, zeros = packed.tensors, _zeros(packed)[order].flatten()
        moved = {"codes": own["codes"][order], "scales": own["scales"][order]}
        return replace(packed, tensors={**moved, "zeros": pack(zeros, _whole(packed, "bits"))})

    def kernels(self) -> Sequence[Kernel]:
        return (
            Kernel("triton", "linear", packed_linear, _no_triton),
            Kernel("triton", "site", packed_site, _no_triton),
            Kernel("triton", "experts", packed_experts, refuses),
            Kernel("triton", "experts_site", packed_experts_site, refuses),
        )

    def activation_group(self, packed: Packed, rotated: bool) -> int:
        return activation_group(packed.shape[-1], _whole(packed, "group_size"), rotated)

    def inductor_options(self, folder: Path) -> AbstractContextManager[dict[str, Any]]:
        return inductor_options(folder, self.operators["cpu"], self.operators["cpu_experts"])


def _no_triton(named: Mapping[str, Any]) -> str | None:
    return None if dispatch.runs_triton(named["x"]) else "Triton doesn't serve this device or dtype"


def _zeros(packed: Packed) -> Tensor:
    """Zero codes (out_features, groups)."""
    scales = packed.tensors["scales"]
    return unpack(packed.tensors["zeros"], _whole(packed, "bits"), scales.numel()).view(scales.shape)


def _whole(packed: Packed, key: str) -> int:
    value = packed.spec[key]
    assert isinstance(value, int)
    return value
