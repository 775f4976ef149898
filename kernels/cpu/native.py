"""The compiled kernels in this process: loaded once, at their first use."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from lopro_fx.kernels.cpu import build

PATHS = ("avx512", "avx2", "portable")

_lock = threading.RLock()
_log = logging.getLogger(__name__)


def load() -> bool:
    """Whether the kernels serve CPU tensors; builds and loads them if that wasn't tried yet."""
    return library() is not None


def active_path() -> str:
    """ "avx512", "avx2" or "portable", whichever the kernels run here; "aten" where they could not be built.

    The environment variable LOPRO_FX_CPU_ISA names a lower path than the processor's best one.
    """
    loaded = library()
    return "aten" if loaded is None else loaded.lopro_cpu_path().decode()


@contextmanager
def forced(path: str) -> Iterator[bool]:
    """Run `path` inside; yield False and change nothing where the processor or the library lacks it."""
    loaded = library()
    before = active_path()
    found = loaded is not None and loaded.lopro_cpu_set_path(path.encode())
    try:
        yield bool(found)
    finally:
        if loaded is not None and found:
            loaded.lopro_cpu_set_path(before.encode())


def library() -> ctypes.CDLL | None:
    """The shared library of compiled kernels; None where it can't be built."""
    # Threads that come together wait for one build, and share its result or its one warning.
    with _lock:
        return _library()


def call(name: str, *arguments: float | Tensor) -> None:
    """Call a C function of the library; tensors are contiguous, on the CPU, and passed by address."""
    loaded = library()
    assert loaded is not None
    function = getattr(loaded, name)
    function.restype = None
    function(*map(_argument, arguments))


def _argument(value: float | Tensor) -> ctypes._SimpleCData:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        assert value.device.type == "cpu"
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        path = str(build.shared_library())
        torch.ops.load_library(path)
    except (build.BuildError, OSError) as error:
        _log.warning("packed Linears run as ATen operators, many times slower than compiled code: %s", error)
        return None
    library = ctypes.CDLL(path)
    library.lopro_cpu_path.restype = ctypes.c_char_p
    library.lopro_cpu_set_path.restype = ctypes.c_bool
    library.lopro_cpu_set_path.argtypes = [ctypes.c_char_p]
    return library
