"""Select the kernel of an operator: Triton on CUDA, plain ATen elsewhere.

A selection may depend on the number of tokens M only where M is known when the program is traced: a guard would tie a
program with a free length to the lengths that it was compiled with. Decode programs have a fixed M and get the kernels
for few tokens; a free M gets those for many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Most tokens of the gemv: it reads weights once, without tensor cores, which one token would leave mostly idle.
DECODE_TOKENS = 1
# Above this, weights are dequantised once for a dense gemm: enough tokens share the cost of writing them out.
DENSE_TOKENS = 512
# Up to here a norm is fused with the rotation: every program of a token computes it anew, reading the row from L2.
NORM_TOKENS = 64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Multiprocessors and compute capability to plan for without a device (those of an H100 SXM and an H200).
_PROCESSORS, _CAPABILITY = 132, (9, 0)
_FORCED: ContextVar[bool] = ContextVar("forced", default=False)


def runs_triton(x: Tensor) -> bool:
    """Whether Triton kernels serve this activation."""
    return (x.is_cuda or _FORCED.get()) and x.dtype in _DTYPES and _has_triton()


def at_most(tokens: int | torch.SymInt, limit: int) -> bool:
    """Whether `tokens` is known to be at most `limit`, without a guard on it."""
    if isinstance(tokens, int):
        return tokens <= limit
    # Imported here: it brings sympy, which a process that only runs programs doesn't need.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(tokens <= limit)


def processors(device: torch.device) -> int:
    """Multiprocessors of the device, or those of the GPU that the kernels were planned for."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the device, or that of the GPU that the kernels were planned for."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _CAPABILITY
    return torch.cuda.get_device_capability(device)


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Send CPU tensors to the Triton kernels too; they run where TRITON_INTERPRET=1 was set before the import."""
    token = _FORCED.set(True)
    try:
        yield
    finally:
        _FORCED.reset(token)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
