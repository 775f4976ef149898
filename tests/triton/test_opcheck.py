"""`torch.library.opcheck` of every operator that launches a Triton kernel, with the launch.

The interpreter takes no fake tensors, so there the checks are those that run the kernel alone: that it changes none of
its operands, and that autograd is registered as torch asks for. A free number of tokens is covered by
`tests/gpu/test_compile.py`.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.samples import DEVICE, launches_triton, operators
from tests.triton.conftest import INTERPRETED

CHECKS = ("test_schema", "test_autograd_registration")
if not INTERPRETED:
    CHECKS += ("test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("name", [name for name in operators() if launches_triton(name)])
def test_every_operator_passes_opcheck(device: torch.device, name: str) -> None:
    operator = getattr(torch.ops.lopro, name).default
    for label, arguments in DEVICE[name](device.type).items():
        try:
            torch.library.opcheck(operator, arguments, test_utils=CHECKS)
        except Exception as error:
            raise AssertionError(f"lopro::{name}, {label}: {error}") from error
