"""`lopro::rotate_device`: the Triton form of `lopro::rotate`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lopro_fx.kernels.rotate.triton import rotate_kernel

_CHUNK = 256


def launch(x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int) -> Tensor:
    """Arguments and result as `lopro::rotate`, for x (M, K), contiguous."""
    m, k = x.shape
    y = torch.empty_like(x)
    chunk = max(block, _CHUNK)
    wrap_triton(rotate_kernel)[(m, triton.cdiv(skip, chunk) + triton.cdiv(k - skip, chunk))](
        x, x if perm is None else perm, x if signs is None else signs, y,
        K=k, SKIP=skip, CHUNK=chunk, LOG_BLOCK=block.bit_length() - 1, HAS_PERM=perm is not None,
        HAS_SIGNS=signs is not None,
    )  # fmt: skip
    return y


# The function above stays callable as it is, which is how launches are recorded without a device.
rotate_device = triton_op("lopro::rotate_device", launch, mutates_args={})
