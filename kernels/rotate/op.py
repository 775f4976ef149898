"""Registration of `lopro::rotate`."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels import dispatch, registry
from lopro_fx.kernels.rotate import reference


def rotate(x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int) -> Tensor:
    """`reference.rotate`, in Triton where it serves."""
    if not dispatch.runs_triton(x):
        return reference.rotate(x, perm, signs, block, skip)
    from lopro_fx.kernels.rotate.device import rotate_device

    return rotate_device(x.reshape(-1, x.shape[-1]).contiguous(), perm, signs, block, skip).view(x.shape)


registry.register("rotate(Tensor x, Tensor? perm, Tensor? signs, int block, int skip) -> Tensor", rotate)
