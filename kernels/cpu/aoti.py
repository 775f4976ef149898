"""Make AOTInductor call a kernel's C function and link it into the model's own library.

The artifact holds the kernels as machine code for every processor path, and runs with torch or libtorch alone. A
registered operator would need its library beside the artifact, and a Python one this package. A template of Inductor's
would depend on private code of torch that moves with each release.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lopro_fx.kernels.cpu import build
from lopro_fx.kernels.scratch import variable

_C_TYPES = {"Tensor": "AtenTensorHandle", "Optional[Tensor]": "AtenTensorHandle*", "int": "int64_t",
            "float": "double"}  # fmt: skip


@contextmanager
def inductor_options(folder: Path, *names: str) -> Iterator[dict[str, Any]]:
    """Context with options for `torch._inductor.aot_compile` of a program with `lopro::<name>` of any of the names;
    compile inside it.

    Args:
        folder: empty, with a path that a command line takes; the linker finds the kernel there.
        names: of a format's operators for CPUs.

    Raises: BuildError if the archive could not be built.
    """
    archive = build.archive()
    operators = [getattr(torch.ops.lopro, name).default for name in names]
    # A link: the cache's own path may hold the character that separates folders.
    (folder / archive.name).symlink_to(archive.absolute())
    # gcc and clang look for libraries here; Inductor has no option for a folder.
    with variable("LIBRARY_PATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("LIBRARY_PATH"))))):
        yield {
            "aot_inductor.custom_ops_to_c_shims": {operator: [_declaration(operator)] for operator in operators},
            "aot_inductor.custom_op_libs": [archive.stem.removeprefix("lib")],
        }


def _declaration(operator: torch._ops.OpOverload) -> str:
    """The C function by the name that Inductor gives it, as `shim.h` declares it."""
    arguments = [f"{_C_TYPES[str(argument.type)]} {argument.name}" for argument in operator._schema.arguments]
    name = operator._schema.name.removeprefix("lopro::")
    return f"AOTITorchError aoti_torch_cpu_{name}({', '.join(arguments)}, AtenTensorHandle* y)"
