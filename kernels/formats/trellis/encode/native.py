"""The compiled search."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lopro_fx.kernels.cpu import native
from lopro_fx.kernels.formats.trellis.code import table
from lopro_fx.kernels.formats.trellis.encode import reference


def encode(
    columns: Tensor, target: Tensor, upper: Tensor, pivots: Tensor, importance: Tensor, strips: Sequence[int],
    step: int, pair: int, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.encode` by compiled code, on the CPU; in ATen where there is no compiler.

    Tensors of another device are copied.
    """
    library = _library()
    if library is None:
        return reference.encode(columns, target, upper, pivots, importance, strips, step, pair, window)
    host = [t.to("cpu", torch.float32).contiguous() for t in (columns, target.clone(), upper, pivots, importance)]
    values = _values(window, pair)
    width, rows = columns.shape
    error = torch.empty_like(host[0])
    states = torch.empty(width // pair, rows, dtype=torch.int16, device="cpu")
    counts = (ctypes.c_int64 * len(strips))(*strips)
    numbers = map(ctypes.c_int64, (width, rows, step, pair, window))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*host, values, error, states)]
    library(*numbers, counts, ctypes.c_int64(len(strips)), *pointers)
    return error.to(columns.device), states.to(columns.device)


@cache
def _values(window: int, pair: int) -> Tensor:
    return table(window, pair).T.contiguous()


@cache
def _library() -> ctypes._NamedFuncPointer | None:
    library = native.library()
    if library is None:
        return None
    library.lopro_trellis_encode.restype = None
    return library.lopro_trellis_encode
