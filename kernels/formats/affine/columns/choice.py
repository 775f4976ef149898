"""Choice of the loops for a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor

from lopro_fx.kernels.cpu.native import load
from lopro_fx.kernels.dispatch import runs_triton
from lopro_fx.kernels.formats.affine.columns import native, reference
from lopro_fx.kernels.formats.affine.grid import Grid


class Loops(Protocol):
    """The functions of `reference`."""

    fit_grid: Callable[[Tensor, int, Tensor | None, int], Grid]
    round_columns: Callable[[Tensor, Tensor, Tensor, Grid], tuple[Tensor, Tensor]]
    descend_columns: Callable[[Tensor, Tensor, Tensor, Tensor, Grid, int, bool], None]


def loops(like: Tensor) -> Loops:
    """Triton on a GPU, compiled code on a CPU that has a compiler, ATen elsewhere."""
    if like.dtype == torch.float32 and runs_triton(like):
        from lopro_fx.kernels.formats.affine.columns import device

        return cast(Loops, device)
    compiled = like.dtype == torch.float32 and like.device.type == "cpu" and load()
    return cast(Loops, native if compiled else reference)
