"""The format "trellis": see `code.py` for its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.cpu.aoti import inductor_options
from lopro_fx.kernels.formats.base import Format, Kernel, Packed, Scalar
from lopro_fx.kernels.formats.trellis.code import code_words, strip_rows, values, windows, windows_of
from lopro_fx.kernels.formats.trellis.experts.op import trellis_experts, trellis_experts_site
from lopro_fx.kernels.formats.trellis.linear.op import trellis_linear
from lopro_fx.kernels.formats.trellis.quantizer import TrellisQuantizer
from lopro_fx.kernels.formats.trellis.site.op import trellis_site
from lopro_fx.kernels.routed.choice import refuses


class Trellis(Format):
    """Weights read from windows of a bit string a column, times a scale a row.

    `bits` of a weight (1.5, 2, 2.5, 3, 4), `columns` of a step (1 or 2), `window` of a state (12 to 16 bits), `strip`
    rows of a string (a multiple of 32; -1 for all).
    """

    name: ClassVar[str] = "trellis"
    spec: ClassVar[Mapping[str, Scalar]] = {"bits": 3.0, "columns": 1, "window": 14, "strip": 512}
    quantizer = TrellisQuantizer
    operators: ClassVar[Mapping[str, str]] = {"cpu": "trellis_cpu", "cpu_experts": "trellis_cpu_experts"}

    def empty(self, shape: tuple[int, ...], spec: Mapping[str, Any]) -> Packed:
        words = code_words(shape, step_of(spec), spec["columns"], spec["strip"])
        tensors = {
            "scales": torch.empty(shape[0], dtype=torch.float16, device="meta"),
            "codes": torch.empty(words, dtype=torch.int32, device="meta"),
        }
        return Packed(self.name, shape, {key: spec[key] for key in self.spec}, tensors)

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        columns, window, strip = (_whole(packed, key) for key in ("columns", "window", "strip"))
        states = windows(packed.tensors["codes"], packed.shape, step_of(packed.spec), columns, window, strip)
        dense = values(states, columns).flatten(1)[:, : packed.shape[1]]
        return (dense * packed.tensors["scales"].to(torch.float32).unsqueeze(1)).to(dtype)

    def lookup(self, packed: Packed, ids: Tensor, dtype: torch.dtype) -> Tensor:
        columns, window, strip = (_whole(packed, key) for key in ("columns", "window", "strip"))
        states = windows_of(packed.tensors["codes"], ids, packed.shape, step_of(packed.spec), columns, window, strip)
        dense = values(states, columns).flatten(-2)[..., : packed.shape[1]]
        return (dense * packed.tensors["scales"].to(torch.float32)[ids].unsqueeze(-1)).to(dtype)

    def cat(self, parts: Sequence[Packed]) -> Packed | str:
        strip = _whole(parts[0], "strip")
        rows = sum(part.shape[0] for part in parts)
        if [count for part in parts for count in strip_rows(part.shape[0], strip)] != strip_rows(rows, strip):
            return f"{', '.join(str(part.shape[0]) for part in parts)} rows are not whole strips of {strip}"
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in self.tensor_names}
        return replace(parts[0], shape=(rows, parts[0].shape[1]), tensors=tensors)

    def kernels(self) -> Sequence[Kernel]:
        return (
            Kernel("triton", "linear", trellis_linear, _no_triton),
            Kernel("triton", "site", trellis_site, _no_triton),
            Kernel("triton", "experts", trellis_experts, refuses),
            Kernel("triton", "experts_site", trellis_experts_site, refuses),
        )

    def inductor_options(self, folder: Path) -> AbstractContextManager[dict[str, Any]]:
        return inductor_options(folder, self.operators["cpu"], self.operators["cpu_experts"])


def _no_triton(named: Mapping[str, Any]) -> str | None:
    return None if dispatch.runs_triton(named["x"]) else "Triton doesn't serve this device or dtype"


def step_of(spec: Mapping[str, Any]) -> int:
    """New bits of a step."""
    return round(spec["bits"] * spec["columns"])


def _whole(packed: Packed, key: str) -> int:
    value = packed.spec[key]
    assert isinstance(value, int)
    return value
