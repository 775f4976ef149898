"""Tensors for safetensors, each storage once; ties, strides and devices, which the format lacks, go to JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lopro_fx.errors import CheckpointError
from lopro_fx.passes.ties import identity

# A tensor with gaps may span this many times its bytes, and this many bytes.
_MOST_SPREAD, _LEAST_SPREAD = 16, 1 << 28


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split tensors into those to write and the layout from which `join` rebuilds the originals.

    Tied tensors are written once. Views that overlap in part are each written whole.
    """
    owners: dict[tuple[Any, ...], str] = {}
    ties, strides, devices, parameters, unique = {}, {}, {}, {}, {}
    for name, tensor in tensors.items():
        owner = owners.setdefault(identity(tensor), name)
        if isinstance(tensor, nn.Parameter):
            parameters[name] = tensor.requires_grad
        if owner != name:
            ties[name] = owner
            continue
        if not tensor.is_contiguous():
            strides[name] = list(tensor.stride())
        if tensor.device.type != "cpu":
            devices[name] = str(tensor.device)
        unique[name] = _alone(tensor)
    return unique, {"ties": ties, "strides": strides, "devices": devices, "parameters": parameters}


def join(stored: Mapping[str, Tensor], layout: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inverse of `split`; tied parameters become one object again.

    Raises:
        KeyError: a tensor is missing.
        RuntimeError: a tensor's device is not there.
    """
    base = {name: _restored(name, tensor, layout) for name, tensor in stored.items()}
    base.update((name, base[owner]) for name, owner in layout["ties"].items())
    made: dict[tuple[str, bool], nn.Parameter] = {}
    for name, grad in layout["parameters"].items():
        key = layout["ties"].get(name, name), grad
        if key not in made:
            made[key] = nn.Parameter(base[name], grad)
        base[name] = made[key]
    return base


def read(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        CheckpointError: the file is not one, or can't be read.
    """
    try:
        with safe_open(path, "pt") as file:
            # The file maps tensors at unaligned addresses, where GEMMs round differently: copies are aligned.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a safetensors file that can be read: {error}") from error


def unique(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor), tied tensors once under their first name."""
    seen = set()
    for name, tensor in tensors.items():
        if identity(tensor) not in seen:
            seen.add(identity(tensor))
            yield name, tensor


def _alone(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    # safetensors refuses tensors that overlap in a storage, so a part of one is copied.
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def _restored(name: str, tensor: Tensor, layout: Mapping[str, Any]) -> Tensor:
    if name in layout["strides"]:
        strides = layout["strides"][name]
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
        if span * tensor.element_size() > max(_MOST_SPREAD * tensor.nbytes, _LEAST_SPREAD):
            raise CheckpointError(f"'{name}' of {tensor.nbytes:,} bytes is said to span {span:,} elements")
        strided = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="cpu")
        tensor = strided.copy_(tensor)
    device = layout["devices"].get(name, "cpu")
    if torch.device(device).type == "meta":
        raise CheckpointError(f"'{name}' is said to lie on the device 'meta', which holds no values")
    return tensor.to(device)
