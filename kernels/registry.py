"""How operators enter the `lopro::` namespace.

Each operator but `cpu_site` is composite: its kernel is written in ATen and serves eager mode, fake tensors, autograd
and every backend. Tracing for Inductor or AOTInductor goes through it, so a compiled artifact holds ATen only and loads
in a process that has never imported this package, while an ExportedProgram shows the operator as one node.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("lopro", "FRAGMENT")


def register(schema: str, kernel: Callable[..., torch.Tensor]) -> None:
    """Define `lopro::<schema>` with `kernel` as its composite implementation."""
    _library.define(schema)
    _library.impl(schema.partition("(")[0], kernel, "CompositeImplicitAutograd")


def register_opaque(schema: str, kernel: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> None:
    """Define `lopro::<schema>` as an operator that stays one node in compiled programs.

    `kernel` serves every backend that has none of its own, `fake` makes the result's shape and dtype.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lopro::{name}", fake, lib=_library)
