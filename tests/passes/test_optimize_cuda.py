"""All passes for a GPU: what stands around a site is part of it, and the program is as whole as before."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import pytest
import torch
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx import ConfigError, GraphError
from lopro_fx.passes.record import META
from tests.helpers import assert_close
from tests.passes.quantised import PACKED_SITE, assert_same, assert_unchanged_by, calls, notes, run
from tests.programs import decoder, ids

aten = torch.ops.aten
# One norm serves the two branches of a block, whose weight is the program's.
AROUND = [{"norm", "eps"}, {"residual"}, {"norm", "eps"}, {"gate", "activation", "residual"}]


@functools.cache
def quantised(dtype: torch.dtype = torch.float32) -> ExportedProgram:
    config = lopro_fx.LoPRo(bits=3, group_size=32, rank=2, clip_steps=2, sweeps=0, refits=0, transforms="full")
    program = lopro_fx.quantize(decoder(depth=2, rms=True)[1], [ids()], config)
    return program if dtype == torch.float32 else _in(dtype, program)


def _in(dtype: torch.dtype, program: ExportedProgram) -> ExportedProgram:
    module = decoder(depth=2, rms=True)[0].to(dtype)
    exported = torch.export.export(module, (ids(),), strict=False)
    config = lopro_fx.RTN(bits=4, group_size=32)
    return lopro_fx.quantize(exported, None, config)


@pytest.fixture(scope="module")
def optimized() -> ExportedProgram:
    return lopro_fx.optimize(quantised(), target="cuda")


def test_four_sites_a_block_and_nothing_elementwise(optimized: ExportedProgram) -> None:
    sites = calls(optimized, PACKED_SITE)
    assert [set(site.kwargs) for site in sites] == 2 * AROUND
    for gone in (aten.rms_norm.default, aten.silu.default, aten.mul.Tensor, aten.add.Tensor):
        assert not calls(optimized, gone)
    for shape in ((2, 9), (1, 1), (3, 17)):
        assert_same(quantised(), optimized, ids(*shape), ratio=4e-6)


@pytest.mark.parametrize(("switch", "left"), [("prologue", {"norm", "eps", "gate", "activation"}),
                                              ("residual", {"residual"})])  # fmt: skip
def test_each_can_be_left_out(switch: str, left: set[str]) -> None:
    result = lopro_fx.optimize(quantised(), target="cuda", **{switch: False})
    assert [set(site.kwargs) for site in calls(result, PACKED_SITE)] == 2 * [kwargs - left for kwargs in AROUND]
    assert_same(quantised(), result, ids(3, 5), ratio=4e-6)


def test_no_target_leaves_sites_as_they_are() -> None:
    assert not any(site.kwargs for site in calls(lopro_fx.optimize(quantised()), PACKED_SITE))


def test_rounding_is_saved_in_narrow_types() -> None:
    program = quantised(torch.bfloat16)
    result = lopro_fx.optimize(program, target="cuda")
    assert [set(site.kwargs) for site in calls(result, PACKED_SITE)][-1] == AROUND[-1]
    assert_same(program, result, ids(), ratio=2e-2)


def test_a_second_run_changes_nothing(optimized: ExportedProgram) -> None:
    again = lopro_fx.optimize(optimized, target="cuda")
    assert again.graph_module.code == optimized.graph_module.code


def test_the_input_program_is_not_changed() -> None:
    assert_unchanged_by(lambda program: lopro_fx.optimize(program, target="cuda"), quantised())


def test_save_and_load(optimized: ExportedProgram, tmp_path: Path) -> None:
    lopro_fx.save(optimized, tmp_path / "saved")
    loaded = lopro_fx.load(tmp_path / "saved")
    assert torch.equal(run(loaded, ids(3, 5))[0], run(optimized, ids(3, 5))[0])
    assert notes(loaded) == notes(optimized)


def test_it_exports_and_compiles(optimized: ExportedProgram) -> None:
    want = run(optimized, ids(3, 5))[0]
    stored = io.BytesIO()
    torch.export.save(optimized, stored)
    stored.seek(0)
    assert torch.equal(run(torch.export.load(stored), ids(3, 5))[0], want)
    with torch.no_grad():
        assert torch.equal(torch.export.unflatten(optimized)(ids(3, 5)), want)
    torch._dynamo.reset()
    compiled = torch.compile(optimized.module(), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        assert_close("compiled", want, compiled(ids(3, 5)), 2e-6)


def test_the_record_says_what_was_done(optimized: ExportedProgram) -> None:
    names = set(optimized.graph_module.meta[META]["sites"])
    for name in ("fuse_prologue", "fuse_residual"):
        assert {site for note in notes(optimized) if note["pass"] == name for site in note["what"]} == names


def test_a_cpu_wants_the_quantised_program(optimized: ExportedProgram) -> None:
    with pytest.raises(GraphError, match=r"'blocks\.0\.q' holds norm, eps since the program was optimised for CUDA"):
        lopro_fx.optimize(optimized, target="cpu")


def test_an_unknown_target() -> None:
    with pytest.raises(ConfigError, match="target is 'tpu'"):
        lopro_fx.optimize(quantised(), target="tpu")


def test_launches_of_a_step(optimized: ExportedProgram) -> None:
    pytest.importorskip("triton", reason="the names are those of Triton kernels")
    pairs = {1: ["decode_prepare", "decode_product"], 16: ["rotate_project", "packed_linear_device"]}
    for tokens, kernels in pairs.items():
        report = lopro_fx.backend_report(optimized, tokens=tokens)
        assert [row["kernels"] for row in report.rows] == 8 * [kernels]
    # Fused, the gate is read where the sites before wrote it.
    down = lopro_fx.backend_report(optimized, tokens=16).rows[3]
    assert (down["read"]["x"], down["read"]["gate"], down["read"]["residual"]) == (16 * 48 * 4, 16 * 48 * 4, 16 * 128)
    many = lopro_fx.backend_report(optimized, tokens=2048).rows
    assert [row["kernels"][0] for row in many[:4]] == ["aten", "rotate_device", "aten", "rotate_device"]
