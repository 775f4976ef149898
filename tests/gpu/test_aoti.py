"""AOTInductor packages for the GPU run in a process that has torch and nothing of lopro_fx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import lopro_fx
from tests.gpu.programs import TOLERANCE, on_cuda, optimized, run
from tests.helpers import assert_close
from tests.programs import ids

pytestmark = pytest.mark.gpu
RUN = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save([run(ids.cuda()).cpu() for ids in inputs], sys.argv[3])
assert not any(name.startswith("lopro_fx") for name in sys.modules), "the package needs lopro_fx"
"""


@pytest.mark.parametrize(
    ("dynamic", "shapes"), [(False, [(1, 1)]), (True, [(1, 1), (2, 9), (3, 40)])], ids=["one token", "any length"]
)
def test_package_runs_without_lopro_fx(dynamic: bool, shapes: list[tuple[int, int]], tmp_path: Path) -> None:
    program = on_cuda(optimized(torch.bfloat16, (2, 9) if dynamic else (1, 1), dynamic))
    lopro_fx.export_aoti(program, tmp_path / "model.pt2")
    inputs = [ids(*shape) for shape in shapes]
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "outputs.pt")]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, cwd=tmp_path,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for x, got in zip(inputs, outputs, strict=True):
        assert_close(f"{tuple(x.shape)}", run(program, x.cuda()).cpu(), got, TOLERANCE[torch.bfloat16])
