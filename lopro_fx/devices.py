"""Devices of a program's tensors and of the work on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram

from lopro_fx.errors import ConfigError, first_line


def home_of(program: ExportedProgram) -> torch.device:
    """Device of the program's first tensor; the CPU for a program without tensors."""
    tables = (program.state_dict, program.constants)
    tensors = (value for table in tables for value in table.values() if isinstance(value, torch.Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def available(device: torch.device | str) -> torch.device:
    """Resolve a device, a GPU to one with an index; "auto" is a CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: torch can't compute there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = "give auto, cpu, cuda or cuda:N"
    try:
        if isinstance(device, (str, torch.device)):
            found = torch.empty(0, dtype=torch.float32, device=device).device
            if found.type != "meta":
                return torch.device("cpu") if found.type == "cpu" else found
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # For other kinds of devices, torch's message is a page long.
        reason = first_line(error) if str(device).startswith("cuda") else reason
        raise ConfigError(f"device '{device}': torch can't compute there: {reason}") from error
    raise ConfigError(f"device '{device}': torch can't compute there: {reason}")


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute fp32 GEMMs in fp32 inside the block, whatever the process allows elsewhere.

    With the 10 bits of TF32 or 8 of bf16, the Cholesky factorisation of a Gram fails or gives another matrix's factor.
    """
    # pyright doesn't know `torch.backends.mkldnn.matmul`.
    backends: list[Any] = [backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn)]  # pyright: ignore[reportAttributeAccessIssue]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
