"""Operands that don't fit each other: no operator reads outside of them, and no program with such is loaded."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from lopro_fx.errors import GraphError
from lopro_fx.kernels.formats.registry import OPERATORS
from lopro_fx.passes.fit import require_fit
from tests.hostile.child import outcome
from tests.kernels.samples import COMPOSITE

_DTYPES = (torch.float32, torch.float64, torch.int8, torch.int64, torch.int32, torch.bool, torch.complex64)
# Their first sizes are a program's own.
_FREE = ("x", "gate", "residual", "latent", "ids")


class _Guarded:
    """Copies of tensors that end where a page begins that nobody may read; kept as long as this object."""

    def __init__(self) -> None:
        self._areas: list[mmap.mmap] = []
        self._libc = ctypes.CDLL(None, use_errno=True)

    def copy(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().contiguous()
        if not value.numel():
            return value
        pages = -(-value.nbytes // mmap.PAGESIZE)
        area = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
        self._areas.append(area)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for place in (start, start + (pages + 1) * mmap.PAGESIZE):
            assert self._libc.mprotect(ctypes.c_void_p(place), mmap.PAGESIZE, 0) == 0
        offset = (pages + 1) * mmap.PAGESIZE - value.nbytes
        copy = torch.frombuffer(area, dtype=value.dtype, count=value.numel(), offset=offset)
        return copy.view(value.shape).copy_(value)


def _names(operator: Any) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


def _resized(value: Tensor, dim: int, size: int) -> Tensor:
    if not value.shape[dim]:
        return value.new_zeros(*value.shape[:dim], size, *value.shape[dim + 1 :])
    return value.index_select(dim, torch.arange(size) % value.shape[dim])


def _sizes(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dim, size in enumerate(value.shape):
        for other in sorted({0, 1, size - 1, size + 1, 2 * size} - {size, -1}):
            yield f"dim {dim} of {other}, not {size}", _resized(value, dim, other)


def _changes(arguments: tuple[Any, ...], names: list[str]) -> Iterator[tuple[str, int, Any]]:
    """What changed, and the place and the new value of the operand."""
    for place, (name, value) in enumerate(zip(names, arguments, strict=False)):
        others: list[Any] = []
        if isinstance(value, Tensor):
            value = value.detach()
            yield from ((f"{name}: {what}", place, other) for what, other in _sizes(value))
            others = [None, value.reshape(-1) if value.dim() > 1 else value.unsqueeze(0), value.reshape(-1)[0]]
            others += [value.to(dtype) for dtype in _DTYPES if dtype != value.dtype]
            if not value.is_floating_point():
                for number in (torch.iinfo(value.dtype).min, -1, torch.iinfo(value.dtype).max):
                    others.append(value.clone())
                    others[-1].view(-1)[-1] = number
        elif isinstance(value, int) and not isinstance(value, bool):
            others = [-1, 0, 1, value - 1, value + 1, 2 * value, 1 << 31, 1 << 40, -(1 << 40)]
        elif isinstance(value, float):
            others = [0.0, -1.0, value + 1, value + 0.5, 1e30, float("nan"), float("inf")]
        elif isinstance(value, str):
            others = ["nonsense"]
        yield from ((f"{name}: {number}", place, other) for number, other in enumerate(others))


def _attacked(name: str) -> dict[str, int]:
    """Call an operator with each change of its samples' operands; count the values and errors that came."""
    operator = getattr(torch.ops.lopro, name).default
    counts = {"value": 0, "error": 0}
    for label, arguments in COMPOSITE[name]().items():
        guarded = _Guarded()
        good = tuple(guarded.copy(value) for value in arguments)
        with torch.no_grad():
            if not torch.equal(operator(*good), operator(*arguments).detach()):
                raise AssertionError(f"{label}: other values where operands lie elsewhere")
            for _, place, value in _changes(arguments, _names(operator)):
                changed = list(good)
                changed[place] = guarded.copy(value)
                try:
                    operator(*changed)
                    counts["value"] += 1
                except Exception:  # ATen's own, of any class
                    counts["error"] += 1
    return counts


@pytest.mark.parametrize("name", COMPOSITE)
def test_nothing_outside_of_operands_is_read(name: str) -> None:
    found = outcome(lambda: _attacked(name), seconds=120, more_bytes=4 << 30)
    assert found.kind == "value", found
    assert found.what["error"] > 0


def _node(operator: Any, arguments: tuple[Any, ...]) -> Node:
    graph = Graph()

    def placed(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(name)
        node.meta["val"] = value.detach().to("meta")
        return node

    return graph.call_function(operator, tuple(map(placed, _names(operator), arguments)))


_PROGRAM = [name for name in COMPOSITE
            if getattr(torch.ops.lopro, name).default in OPERATORS or name in ("rotate", "project")]  # fmt: skip


@pytest.mark.parametrize("name", _PROGRAM)
def test_operands_fit_or_are_refused(name: str) -> None:
    operator = getattr(torch.ops.lopro, name).default
    names, refused, taken = _names(operator), 0, 0
    for label, arguments in COMPOSITE[name]().items():
        require_fit(_node(operator, arguments))
        for place, (operand, value) in enumerate(zip(names, arguments, strict=False)):
            if not isinstance(value, Tensor) or operand in _FREE:
                continue
            for what, other in _sizes(value.detach()):
                changed = (*arguments[:place], other, *arguments[place + 1 :])
                if not _fits(operator, changed):
                    refused += 1
                    continue
                # Such as fewer rows in the same words: a weight of another size, whose ids may be beyond it.
                taken += 1
                with torch.no_grad(), suppress(*((IndexError, ValueError) if "ids" in names else ())):
                    assert operator(*changed).isfinite().all(), f"{label}, {operand}: {what}"
    assert refused > taken


def _fits(operator: Any, arguments: tuple[Any, ...]) -> bool:
    try:
        require_fit(_node(operator, arguments))
    except GraphError as error:
        return str(operator) not in str(error)
    return True
