"""Choice of the search for a tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lopro_fx.kernels.cpu.native import load
from lopro_fx.kernels.dispatch import runs_triton
from lopro_fx.kernels.formats.trellis.encode import native, reference

Encode = Callable[..., tuple[Tensor, Tensor]]


def search(like: Tensor) -> Encode:
    """`encode` by Triton on a GPU, by compiled code on a CPU that has a compiler, in ATen elsewhere."""
    if like.dtype == torch.float32 and runs_triton(like):
        from lopro_fx.kernels.formats.trellis.encode import device

        return device.encode
    compiled = like.dtype == torch.float32 and like.device.type == "cpu" and load()
    return native.encode if compiled else reference.encode
