"""Recognise tied tensors: a weight that several modules share has a name in each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lopro_fx.passes.compat import is_fake


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tied tensors: the same elements of the same storage, in the same order."""
    if not tensor.numel() or is_fake(tensor):
        return (id(tensor),)
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *place, tuple(tensor.shape), tensor.stride(), tensor.dtype
