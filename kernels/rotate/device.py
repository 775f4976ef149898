"""`lopro::rotate_device` and `lopro::rotate_project`: `lopro::rotate` in Triton, alone and with `lopro::project`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import dispatch, registry
from lopro_fx.kernels.fragments import ordered_columns
from lopro_fx.kernels.rotate.triton import rotate_kernel
from lopro_fx.kernels.tiles import stand_in

_CHUNK = 256
# Most partial sums of a projection; rows of the down factor loaded at a time.
_PARTS, _RANKS = 16, 16


def launch(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, norm: Tensor | None = None,
    eps: float = 0.0, gate: Tensor | None = None, activation: str = "", width: int = 0, step: int = 0,
) -> Tensor:  # fmt: skip
    """`lopro::rotate` of x (M, K) with contiguous columns, after a prologue.

    norm, eps, gate, activation, width and step are as in `launch_project`.
    """
    y = _result(x, width, step)
    _run(x, perm, signs, block, skip, None, None, norm, eps, gate, activation, y, None, max(block, _CHUNK), width, step)
    return y


def launch_project(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor, scale: Tensor | None,
    chunk: int, norm: Tensor | None = None, eps: float = 0.0, gate: Tensor | None = None, activation: str = "",
    width: int = 0, step: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotate an activation and project the result before it is rounded to x's dtype.

    Args:
        x: (M, K), with contiguous columns.
        perm, signs, block, skip: as in `lopro::rotate`.
        down, scale: as in `lopro::project`.
        chunk: columns of one partial sum, a multiple of `block` and a power of two.
        norm, eps, gate, activation: prologue as in `prologue/reference.py`, with norm or gate, not both; gate (M, K)
            has contiguous columns.
        width, step: where they aren't 0, x' is returned as by `fragments.ordered`; `skip` is then a multiple of `step`.

    Returns:
        x' (M, K) of x's dtype, and fp32 (parts, M, R), whose sum over the parts is the projection.
    """
    (m, k), rank = x.shape, down.shape[0]
    y = _result(x, width, step)
    latent = x.new_empty((_programs(k, skip, chunk), m, rank), dtype=torch.float32)
    _run(x, perm, signs, block, skip, down, scale, norm, eps, gate, activation, y, latent, chunk, width, step)
    return y, latent


def _result(x: Tensor, width: int, step: int) -> Tensor:
    m, k = x.shape
    return x.new_empty((m, ordered_columns(k, step) if width else k))


def _programs(columns: int, skip: int, chunk: int) -> int:
    return -(-skip // chunk) - (skip - columns) // chunk


def _run(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor | None,
    scale: Tensor | None, norm: Tensor | None, eps: float, gate: Tensor | None, activation: str, y: Tensor,
    latent: Tensor | None, chunk: int, width: int, step: int,
) -> None:  # fmt: skip
    m, k = x.shape
    absent = stand_in(signs, perm, down, norm, x)
    chunks = _programs(k, skip, chunk)
    wrap_triton(rotate_kernel)[(m * chunks,)](
        x, absent if norm is None else norm, absent if gate is None else gate, absent if perm is None else perm,
        absent if signs is None else signs, absent if down is None else down, absent if scale is None else scale, y,
        absent if latent is None else latent, m,
        K=k, R=0 if down is None else down.shape[0], SKIP=skip, CHUNK=chunk, CHUNKS=chunks,
        LOG_BLOCK=block.bit_length() - 1, BLOCK_R=_RANKS, WIDTH=width, STEP=step, X_ROW=x.stride(0), Y_ROW=y.shape[1],
        GATE_ROW=0 if gate is None else gate.stride(0), EPS=eps,
        ACTIVATION="" if gate is None else activation, HAS_NORM=norm is not None, HAS_PERM=perm is not None,
        HAS_SIGNS=signs is not None, HAS_SCALE=scale is not None,
    )  # fmt: skip


def chunk_for(tokens: int | torch.SymInt, columns: int, block: int) -> int:
    """Columns of a partial sum: one token needs many parts to fill the device; more tokens sum fewer parts."""
    few = _CHUNK if dispatch.at_most(tokens, dispatch.DECODE_TOKENS) else -(-columns // _PARTS)
    return max(block, _CHUNK, 1 << (few - 1).bit_length())


# The functions above stay callable as they are, so that launches can be recorded without a device.
rotate_device = registry.register_triton("rotate_device", launch)
rotate_project = registry.register_triton("rotate_project", launch_project)
