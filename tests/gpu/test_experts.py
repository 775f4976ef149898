"""A mixture of experts on the GPU, eager, compiled and packaged, against the program on the CPU."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.export import ExportedProgram

pytest.importorskip("triton")

import lopro_fx
from lopro_fx.methods.base import Method
from tests.gpu.programs import on_cuda, packaged, run
from tests.helpers import assert_close
from tests.mixtures import MixtureDecoder
from tests.programs import export, ids, seeded

pytestmark = pytest.mark.gpu
METHODS: dict[str, Method] = {
    "lopro": lopro_fx.LoPRo(bits=3, group_size=32, rank=4),
    "tileq": lopro_fx.TileQ(bits=4, group_size=32, tile_rank=4),
    "trellis": lopro_fx.TileQ(format="trellis", bits=2, window=12, tile_rank=4),
}
# Decode adds 16-bit fixed point to fp32.
TOLERANCE = 1e-3
SHAPES = [(1, 1), (2, 9), (4, 40)]


@functools.cache
def _state(name: str) -> lopro_fx.QuantState:
    program = export(seeded(MixtureDecoder()), ids(2, 9), dynamic=True)
    return lopro_fx.calibrate(program, [ids(4, 16)], METHODS[name])


def _optimized(name: str, shape: tuple[int, int]) -> ExportedProgram:
    program = export(seeded(MixtureDecoder()), ids(*shape))
    return lopro_fx.optimize(lopro_fx.apply(program, _state(name)), target="cuda")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_logits_are_those_of_the_cpu(name: str, shape: tuple[int, int]) -> None:
    x = ids(*shape)
    expected, program = run(_optimized(name, shape), x), on_cuda(_optimized(name, shape))
    assert_close("eager", expected, run(program, x.cuda()).cpu(), TOLERANCE)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(program.module(), fullgraph=True)(x.cuda())
    assert_close("compiled", expected, got.cpu(), TOLERANCE)


def test_cuda_graphs_follow_the_router() -> None:
    """Nothing waits for the device, so the experts that a replay reads are those of its own tokens."""
    program = on_cuda(_optimized("tileq", (1, 1)))
    torch._dynamo.reset()
    compiled = torch.compile(program.module(), fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(6):
            x = ids(1, 1, seed=seed).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            assert_close(f"call {seed}", run(program, x), compiled(x).clone(), TOLERANCE)


def test_package_runs_without_lopro_fx(tmp_path: Path) -> None:
    program = on_cuda(_optimized("tileq", (1, 1)))
    inputs = [ids(1, 1, seed=seed) for seed in range(3)]
    for x, got in zip(inputs, packaged(program, inputs, tmp_path), strict=True):
        assert_close("packaged", run(program, x.cuda()).cpu(), got, TOLERANCE)
