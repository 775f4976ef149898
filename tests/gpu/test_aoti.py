"""AOTInductor packages for the GPU run in a process that has torch and nothing of lopro_fx."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.programs import TOLERANCE, on_cuda, optimized, packaged, run
from tests.helpers import assert_close
from tests.programs import ids

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dynamic", "shapes"), [(False, [(1, 1)]), (True, [(1, 1), (2, 9), (3, 40)])], ids=["one token", "any length"]
)
def test_package_runs_without_lopro_fx(dynamic: bool, shapes: list[tuple[int, int]], tmp_path: Path) -> None:
    program = on_cuda(optimized(torch.bfloat16, (2, 9) if dynamic else (1, 1), dynamic))
    inputs = [ids(*shape) for shape in shapes]
    for x, got in zip(inputs, packaged(program, inputs, tmp_path), strict=True):
        assert_close(f"{tuple(x.shape)}", run(program, x.cuda()).cpu(), got, TOLERANCE[torch.bfloat16])
