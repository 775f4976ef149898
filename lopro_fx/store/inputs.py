"""Example inputs of a program as JSON and tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lopro_fx.errors import CheckpointError

_PREFIX = "example:"


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Encode nested tuples, lists and dicts as JSON; tensors go into `tensors` under new names.

    Raises:
        CheckpointError: a leaf is neither a tensor nor a plain value.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if type(value) is tuple or type(value) is list:
        return {type(value).__name__: [encode(item, tensors) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": [[key, encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, Tensor):
        name = f"{_PREFIX}{len(tensors)}"
        while name in tensors:
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    raise CheckpointError(
        f"the program's example inputs hold a {type(value).__name__}, which can't be saved: export it with tensors, "
        "numbers, strings, None, tuples, lists and dicts with string keys"
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `encode`.

    Raises:
        KeyError: a tensor is missing.
    """
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in content}
    if kind in ("tuple", "list"):
        items = [decode(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
