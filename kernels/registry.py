"""Register operators in the `lopro::` namespace.

Operators of exported programs, except those of compiled kernels for CPUs, are composite: their kernel serves eager
mode, fake tensors, autograd and every backend, and an ExportedProgram shows them as one node. Inductor and AOTInductor
trace through them, so a compiled artifact holds only ATen and Triton kernels, and loads in a process that has never
imported this package.

Every operator refuses operands on different devices. An operand on the meta device among others has no data: it was
offloaded and not brought back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("lopro", "FRAGMENT")


def register(schema: str, kernel: Callable[..., torch.Tensor]) -> None:
    """Define `lopro::<schema>` with `kernel` as its composite implementation."""
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, _on_one_device(name, kernel), "CompositeImplicitAutograd")


def register_opaque(
    schema: str,
    kernel: Callable[..., torch.Tensor],
    fake: Callable[..., torch.Tensor],
    derivative: tuple[Callable[..., Any], Callable[..., None]] | None = None,
) -> None:
    """Define `lopro::<schema>` as an operator that stays one node in compiled programs.

    `kernel` serves every backend that has none of its own, `fake` makes the result's shape and dtype, `derivative` is
    the backward function and what saves its operands, as in `torch.library.register_autograd`.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _on_one_device(name, kernel), "CompositeExplicitAutograd")
    # An operand on meta among others on a CPU brings the call here, before any kernel.
    torch.library.register_fake(f"lopro::{name}", _on_one_device(name, fake), lib=_library)
    if derivative is not None:
        backward, save = derivative
        torch.library.register_autograd(f"lopro::{name}", backward, setup_context=save, lib=_library)


def register_triton(name: str, launch: Callable[..., Any]) -> Any:
    """`torch.library.triton_op` of `lopro::<name>`."""
    checked: Any = _on_one_device(name, launch)
    # torch reads types from the signature, and would look their names up in this module.
    checked.__signature__ = inspect.signature(launch, eval_str=True)
    return torch.library.triton_op(f"lopro::{name}", checked, mutates_args={})


def _on_one_device(operator: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, after a check that the tensors among its arguments lie on one device."""

    @functools.wraps(kernel)
    def checked(*args: Any, **kwargs: Any) -> Any:
        device = None
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                if device is None:
                    device = value.device
                elif value.device != device:
                    raise _apart(operator, (*args, *kwargs.values()))
        return kernel(*args, **kwargs)

    return checked


def _apart(operator: str, operands: tuple[Any, ...]) -> ValueError:
    given = [str(value.device) for value in operands if isinstance(value, torch.Tensor)]
    return ValueError(
        f"lopro::{operator}: operands lie on different devices ({', '.join(given)}); move the model and its inputs to "
        "one. What lies on 'meta' has no data: it was not loaded, or not brought back from where it was offloaded"
    )
