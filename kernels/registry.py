"""How operators enter the `lopro::` namespace.

Each operator is composite: its kernel is written in ATen and serves eager mode, fake tensors, autograd and every
backend. Tracing for Inductor or AOTInductor goes through it, so a compiled artifact holds ATen only and loads in a
process that has never imported this package, while an ExportedProgram shows the operator as one node.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("lopro", "FRAGMENT")


def register(schema: str, kernel: Callable[..., torch.Tensor]) -> None:
    """Define `lopro::<schema>` with `kernel` as its composite implementation."""
    _library.define(schema)
    _library.impl(schema.partition("(")[0], kernel, "CompositeImplicitAutograd")
