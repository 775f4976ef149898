"""A rounded activation and the packed Linear that reads it become one integer product, or stay with a reason."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx.passes.base import counters
from lopro_fx.passes.calls import ROTATE, ROUND
from lopro_fx.passes.fuse_activation import FuseActivationPass
from lopro_fx.passes.native_cpu import NativeCpuPass
from lopro_fx.passes.operands import operands
from tests.guests import Signs
from tests.passes.quantised import assert_same, assert_unchanged_by, calls, reasons
from tests.programs import decoder, ids

INT8, CPU = torch.ops.lopro.packed_int8.default, torch.ops.lopro.cpu_site.default


@functools.cache
def _rounded(act_bits: int = 8, act_group: int = 0, rank: int = 2, transform: str = "full") -> ExportedProgram:
    config = lopro_fx.LoPRo(bits=3, group_size=32, rank=rank, clip_steps=2, sweeps=0, refits=0, transforms=transform,
                            act_bits=act_bits, act_group=act_group)  # fmt: skip
    return lopro_fx.quantize(decoder(depth=1, bias=True)[1], [ids()], config)


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("act_group", [0, 64, -1])
@pytest.mark.parametrize("rank", [0, 2])
def test_it_computes_the_same(act_bits: int, act_group: int, rank: int) -> None:
    program = _rounded(act_bits, act_group, rank)
    before = counters["fuse_activation.linear"]
    fused = assert_unchanged_by(FuseActivationPass(), program)
    assert counters["fuse_activation.linear"] - before == len(calls(fused, INT8)) == 7
    assert not calls(fused, ROUND)
    for node in calls(fused, INT8):
        # One group of weights in a row puts no limit on the activation's.
        fitting = 128 if operands(node).scales.meta["val"].shape[1] == 1 else 32
        assert (operands(node).act_bits, operands(node).act_group) == (act_bits, act_group or fitting)
    assert_same(program, fused, ids())


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rotation_that_nothing_else_reads_becomes_part_of_it(rank: int) -> None:
    merged = lopro_fx.optimize(_rounded(rank=rank))
    products, rotations = calls(merged, INT8), calls(merged, ROTATE)
    assert [len(node.meta["lopro_fx"]["sites"]) for node in products] == [3, 1, 2, 1]
    # A low-rank branch reads the rotation too.
    assert len(rotations) == (4 if rank else 0)
    assert [operands(node).block for node in products] == ([1] * 4 if rank else [32, 32, 32, 16])
    assert_same(_rounded(rank=rank), merged, ids())


def test_a_format_without_integers_is_left_with_the_reason() -> None:
    program = lopro_fx.quantize(decoder(depth=1, bias=True)[1], [ids()], Signs(act_bits=8))
    left = FuseActivationPass()(program)
    assert "no product of integers" in reasons(left)["blocks.0.q"]
    assert_same(program, left, ids())
    native = NativeCpuPass(0)(program)
    assert "no compiled kernel" in reasons(native)["blocks.0.q"]
    assert_same(program, native, ids())


@pytest.mark.parametrize("transform", ["full", "identity"])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_compiled_code_for_cpus_rounds_as_the_program_says(act_bits: int, transform: str) -> None:
    program = _rounded(act_bits, transform=transform)
    for activations in ("float", "int8"):
        native = lopro_fx.optimize(program, target="cpu", activations=activations)
        assert {operands(node).act_bits for node in calls(native, CPU)} == {act_bits}
        assert not calls(native, ROUND)
        # A number on the edge of two steps may take either.
        assert_same(program, native, ids(), ratio=2e-3 if act_bits == 8 else 2e-2)


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("act_group", [32, 64, 128, -1])
def test_compiled_code_for_cpus_rounds_in_these_groups(act_bits: int, act_group: int) -> None:
    program = _rounded(act_bits, act_group)
    native = lopro_fx.optimize(program, target="cpu")
    # 0 stands for the group that the kernel takes of itself.
    assert {operands(node).act_group for node in calls(native, CPU)} <= {0, act_group}
    assert len(calls(native, CPU)) == 4
    assert_same(program, native, ids(), ratio=2e-3 if act_bits == 8 else 2e-2)
