"""`torch.library.opcheck` of every operator that is registered: one without samples fails.

Operators that launch Triton kernels need a GPU to run for real. What remains here, with launches left out, is that the
fake result is like the real one, that no result is an operand, and that autograd is registered as torch asks for.
`tests/triton/test_opcheck.py` adds on each device, or by interpretation, what a launch takes part in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.samples import COMPOSITE, DEVICE, device_modules, launches_triton, operators

# `test_aot_dispatch` compares values, and there are none without a launch.
WITHOUT_LAUNCH = ("test_schema", "test_autograd_registration", "test_faketensor")
STATIC = (*WITHOUT_LAUNCH, "test_aot_dispatch_static")
# Takes as long as all others together: for one sample of an operator, which has all that a site may have.
DYNAMIC = (*STATIC, "test_aot_dispatch_dynamic")


class _NoLaunch:
    """A kernel that does nothing, whatever its grid."""

    def __init__(self, _: Any) -> None:
        pass

    def __getitem__(self, _: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("name", operators())
def test_every_operator_passes_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = getattr(torch.ops.lopro, name).default
    if launches_triton(name):
        for module in device_modules():
            monkeypatch.setattr(module, "wrap_triton", _NoLaunch)
        assert name in DEVICE, f"tests/kernels/samples.py has no samples of lopro::{name}"
        samples, first, checks = DEVICE[name]("cpu"), WITHOUT_LAUNCH, WITHOUT_LAUNCH
    else:
        assert name in COMPOSITE, f"tests/kernels/samples.py has no samples of lopro::{name}"
        samples, first, checks = COMPOSITE[name](), DYNAMIC, STATIC
    assert samples
    for index, (label, arguments) in enumerate(samples.items()):
        try:
            torch.library.opcheck(operator, arguments, test_utils=checks if index else first)
        except Exception as error:
            raise AssertionError(f"lopro::{name}, {label}: {error}") from error
