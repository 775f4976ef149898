"""A small decoder, quantised once, as optimised programs of any type, shape and device."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx.passes.to_device import to_device
from tests.programs import Decoder, export, ids, seeded

# Error of a whole decoder after rounding every intermediate to the type; decode adds 16-bit fixed point to fp32.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}

RUN = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save([run(ids.cuda()).cpu() for ids in inputs], sys.argv[3])
assert not any(name.startswith("lopro_fx") for name in sys.modules), "the package needs lopro_fx"
"""


def _export(dtype: torch.dtype, shape: tuple[int, int], dynamic: bool) -> ExportedProgram:
    return export(seeded(Decoder(bias=True, rms=True)).to(dtype), ids(*shape), dynamic=dynamic)


@functools.cache
def state() -> lopro_fx.QuantState:
    """The decoder after LoPRo on one batch: 3 bits, every column rotated, rank 4."""
    config = lopro_fx.LoPRo(bits=3, group_size=32, rank=4, refits=0)
    return lopro_fx.calibrate(_export(torch.float32, (2, 9), True), [ids(4, 16)], config)


def optimized(
    dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (2, 9), dynamic: bool = False
) -> ExportedProgram:
    """The quantised decoder exported for `shape` on the CPU; `dynamic` frees both sizes."""
    return lopro_fx.optimize(lopro_fx.apply(_export(dtype, shape, dynamic), state()), target="cuda")


def on_cuda(program: ExportedProgram) -> ExportedProgram:
    """The program on the GPU."""
    return to_device(program, torch.device("cuda"))


def run(program: ExportedProgram, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return program.module()(input_ids)


def packaged(program: ExportedProgram, inputs: list[Tensor], folder: Path) -> list[Tensor]:
    """Results of an AOTInductor package of the program, on the CPU, from a process without lopro_fx."""
    lopro_fx.export_aoti(program, folder / "model.pt2")
    torch.save(inputs, folder / "inputs.pt")
    arguments = [str(folder / name) for name in ("model.pt2", "inputs.pt", "outputs.pt")]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, cwd=folder,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "outputs.pt", weights_only=True)
