"""`optimize(target="cpu")`: every packed Linear becomes one `cpu_site`, in eager mode, compiled, saved and packaged."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lopro_fx
from lopro_fx.errors import ConfigError, GraphError
from lopro_fx.kernels.cpu import build, native
from lopro_fx.passes.base import counters
from lopro_fx.passes.native_cpu import NativeCpuPass
from lopro_fx.passes.operands import operands
from tests.helpers import assert_close
from tests.passes.quantised import (
    CPU_SITE,
    PACKED_LINEAR,
    PACKED_SITE,
    PROJECT,
    ROTATE,
    assert_same,
    assert_unchanged_by,
    calls,
    notes,
    quantised,
    run,
)
from tests.programs import ids

RUN = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([run(ids) for ids in torch.load(sys.argv[2], weights_only=True)], sys.argv[3])
assert "lopro_fx" not in sys.modules
"""


@pytest.mark.parametrize("transform", ["identity", "partial", "full"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("merged", [False, True])
def test_every_site_becomes_one_node(transform: str, rank: int, merged: bool) -> None:
    program, before = quantised(transform, rank), counters["native_cpu.site"]
    native_program = lopro_fx.optimize(program, merge=merged, fuse=merged, target="cpu", activations="float")
    found = calls(native_program, CPU_SITE)
    assert len(found) == counters["native_cpu.site"] - before == (4 if merged else 7)
    assert not any(calls(native_program, target) for target in (ROTATE, PROJECT, PACKED_LINEAR, PACKED_SITE))
    assert [note["what"] for note in notes(native_program) if note["pass"] == "native_cpu"] == [
        node.meta["lopro_fx"]["sites"] for node in found
    ]
    assert_same(program, native_program, ids(3, 5))


def test_rounded_activations_are_close() -> None:
    program = quantised()
    native_program = lopro_fx.optimize(program, target="cpu")
    assert all(operands(node).act_bits == 8 for node in calls(native_program, CPU_SITE))
    assert_same(program, native_program, ids(3, 5), ratio=3e-2)


def test_the_input_program_is_not_changed() -> None:
    assert_unchanged_by(NativeCpuPass(8), quantised())


def test_gradients_are_refused_and_not_left_out() -> None:
    program = quantised()
    module = lopro_fx.optimize(program, target="cpu").module()
    with pytest.raises(RuntimeError, match="does not require grad"):
        module(ids(3, 5)).sum().backward()
    assert any(parameter.requires_grad for parameter in program.parameters())


def test_bad_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="target is 'gpu'"):
        lopro_fx.optimize(quantised(), target="gpu")
    with pytest.raises(ConfigError, match="activations is 'int4'"):
        lopro_fx.optimize(quantised(), target="cpu", activations="int4")


def test_it_saves_loads_and_is_reported(tmp_path) -> None:
    program = lopro_fx.optimize(quantised(), target="cpu")
    lopro_fx.save(program, tmp_path / "saved")
    assert torch.equal(run(lopro_fx.load(tmp_path / "saved"), ids())[0], run(program, ids())[0])
    rows = lopro_fx.backend_report(program, device="cpu").rows
    assert [row["kernels"] for row in rows] == [["cpu_site"]] * 4


def test_compiled_program_gives_the_same() -> None:
    if not native.load():
        pytest.skip("no C++ compiler built the kernel")
    program = lopro_fx.optimize(quantised(), target="cpu")
    module = program.module()
    with torch.no_grad():
        got = torch.compile(module, fullgraph=True)(ids())
    assert_close("compiled", run(program, ids())[0], got, 2e-3)


def test_package_runs_without_lopro_fx(tmp_path) -> None:
    if not native.load():
        pytest.skip("no C++ compiler built the kernel")
    program = lopro_fx.optimize(quantised(), target="cpu")
    lopro_fx.export_aoti(program, tmp_path / "model.pt2")
    inputs = [ids(1, 1), ids(3, 5), ids(2, 17)]
    torch.save(inputs, tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "outputs.pt")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *files], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    for tokens, got in zip(inputs, torch.load(tmp_path / "outputs.pt", weights_only=True), strict=True):
        assert_close(str(tuple(tokens.shape)), run(program, tokens)[0], got, 2e-3)


def test_package_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def refuse() -> None:
        raise build.BuildError("no C++ compiler was found: install g++ or clang++, or set CXX to one")

    monkeypatch.setattr(build, "_built", refuse)
    with pytest.raises(GraphError, match="cpu_site, whose kernel can't be built: no C\\+\\+ compiler"):
        lopro_fx.export_aoti(lopro_fx.optimize(quantised(), target="cpu"), tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()
