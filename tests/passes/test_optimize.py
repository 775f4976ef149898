"""All passes together: fewer nodes, the same results, in a program as whole as before."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import lopro_fx
from lopro_fx import GraphError
from lopro_fx.layer import stored_bytes
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import META
from tests.helpers import assert_close, generator
from tests.passes.quantised import (
    PACKED_LINEAR,
    PACKED_SITE,
    PROJECT,
    ROTATE,
    assert_same,
    assert_unchanged_by,
    calls,
    notes,
    quantised,
    rewritten,
    run,
)
from tests.programs import Block, decoder, ids, rows, seeded


@pytest.fixture(scope="module")
def optimized():
    return lopro_fx.optimize(quantised())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rank", "bits"), [(0, 4), (2, 2), (2, 3)])
@pytest.mark.parametrize("transform", ["identity", "act_order", "partial", "full"])
def test_results_are_the_same(transform: str, rank: int, bits: int, bias: bool) -> None:
    program = quantised(transform, rank, bits, bias)
    result = lopro_fx.optimize(program)
    for shape in ((2, 9), (1, 1), (3, 17)):
        assert_same(program, result, ids(*shape))


def test_one_node_an_input(optimized) -> None:
    assert len(calls(optimized, PACKED_SITE)) == 4
    assert not [node for target in (ROTATE, PROJECT, PACKED_LINEAR) for node in calls(optimized, target)]
    permuted = [operands(node).perm is not None for node in calls(optimized, PACKED_SITE)]
    assert permuted == [True, True, True, False]
    assert [len(node.meta[META]["sites"]) for node in calls(optimized, PACKED_SITE)] == [3, 1, 2, 1]


@pytest.mark.parametrize("skipped", ["merge", "fuse", "fold"])
def test_each_pass_can_be_left_out(skipped: str) -> None:
    program = quantised()
    result = lopro_fx.optimize(program, **{skipped: False})
    names = {"merge": "merge", "fuse": "fuse_site", "fold": "fold_permutation"}
    assert {note["pass"] for note in notes(result)} == set(names.values()) - {names[skipped]}
    assert_same(program, result, ids(3, 5))


def test_every_layer_is_in_the_record(optimized) -> None:
    meta = optimized.graph_module.meta[META]
    assert {key: value for key, value in meta.items() if key != "optimized"} == quantised().graph_module.meta[META]
    for name in ("merge", "fuse_site"):
        assert sorted(site for note in notes(optimized) if note["pass"] == name for site in note["what"]) == sorted(
            meta["sites"]
        )


def test_a_second_run_changes_nothing(optimized) -> None:
    again = lopro_fx.optimize(optimized)
    assert again.graph_module.code == optimized.graph_module.code
    assert torch.equal(run(again, ids())[0], run(optimized, ids())[0])
    assert lopro_fx.report(again).packed_bytes == lopro_fx.report(optimized).packed_bytes


def test_the_input_program_is_not_changed() -> None:
    assert_unchanged_by(lopro_fx.optimize, quantised())


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_without_packed_linears_is_an_error(decomposed: bool) -> None:
    program = quantised().run_decompositions() if decomposed else decoder(depth=1)[1]
    with pytest.raises(GraphError, match="holds no packed Linear to optimise; quantise it first"):
        lopro_fx.optimize(program)


def test_the_report_counts_what_is_stored(optimized) -> None:
    before, after = lopro_fx.report(quantised()), lopro_fx.report(optimized)
    assert (after.rows, after.weights, after.kept_bytes) == (before.rows, before.weights, before.kept_bytes)
    tied = optimized.state_dict["embed.weight"]
    assert after.packed_bytes + after.kept_bytes + stored_bytes([tied]) == stored_bytes(optimized.state_dict.values())
    # One permutation of 48 columns is gone, and zeros share their last words.
    assert 96 <= before.packed_bytes - after.packed_bytes < 96 + 64


def test_save_and_load(optimized, tmp_path: Path) -> None:
    lopro_fx.save(optimized, tmp_path / "saved")
    loaded = lopro_fx.load(tmp_path / "saved")
    assert torch.equal(run(loaded, ids(3, 5))[0], run(optimized, ids(3, 5))[0])
    assert notes(loaded) == notes(optimized)
    marks = [{node.name: node.meta[META] for node in program.graph.nodes if META in node.meta}
             for program in (loaded, optimized)]  # fmt: skip
    assert marks[0] == marks[1]
    assert str(lopro_fx.report(loaded)) == str(lopro_fx.report(optimized))


def test_a_loaded_program_can_be_optimised(optimized, tmp_path: Path) -> None:
    lopro_fx.save(quantised(), tmp_path / "saved")
    result = lopro_fx.optimize(lopro_fx.load(tmp_path / "saved"))
    assert notes(result) == notes(optimized)
    assert torch.equal(run(result, ids(3, 5))[0], run(optimized, ids(3, 5))[0])


def test_it_exports_unflattens_and_decomposes(optimized) -> None:
    want = run(optimized, ids(3, 5))[0]
    stored = io.BytesIO()
    torch.export.save(optimized, stored)
    stored.seek(0)
    assert torch.equal(run(torch.export.load(stored), ids(3, 5))[0], want)
    with torch.no_grad():
        assert torch.equal(torch.export.unflatten(optimized)(ids(3, 5)), want)
    # Unflattening leaves a module in the program's metadata, which editing it copies.
    assert lopro_fx.optimize(optimized).graph_module.code == optimized.graph_module.code
    decomposed = optimized.run_decompositions()
    assert not [node for node in decomposed.graph.nodes if "lopro" in str(node.target) and node.op == "call_function"]
    assert_close("decomposed", want, run(decomposed, ids(3, 5))[0], 2e-6)


def test_sizes_stay_dynamic(optimized) -> None:
    assert optimized.range_constraints == quantised().range_constraints
    assert len(optimized.range_constraints) >= 2
    for shape in ((1, 1), (5, 2), (2, 40)):
        assert run(optimized, ids(*shape))[0].shape == (*shape, 50)


def test_it_compiles_without_breaks(optimized) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(optimized.module(), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 9), (3, 17)):
            assert_close(f"{shape}", run(optimized, ids(*shape))[0], compiled(ids(*shape)), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_programs_stay_narrow(dtype: torch.dtype) -> None:
    module = seeded(Block(bias=True)).to(dtype)
    program = rewritten(module, rows(2, 9).to(dtype))
    result = lopro_fx.optimize(program)
    assert len(calls(result, PACKED_SITE)) == 4
    assert_same(program, result, rows(2, 9, seed=1).to(dtype), ratio=1e-2 if dtype is torch.bfloat16 else 2e-3)


class Mixture(nn.Module):
    """Shared projections of any widths, a gated pair, and a value that is returned as well."""

    def __init__(self, width: int, first: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, first, bias=bias), nn.Linear(width, hidden)
        self.gate, self.up = nn.Linear(first, hidden), nn.Linear(first, hidden, bias=bias)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, z = torch.tanh(self.a(x)), self.b(x)
        return self.down(functional.silu(self.gate(y)) * self.up(y) + z), z


@settings(max_examples=20)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(2, 70), st.sampled_from([2, 3, 4, 8]), st.integers(0, 3),
       st.booleans(), st.sampled_from([32, -1]))  # fmt: skip
def test_any_sizes(width: int, first: int, hidden: int, bits: int, rank: int, bias: bool, group_size: int) -> None:
    x = torch.randn(3, width, generator=generator())
    module = seeded(Mixture(width, first, hidden, bias))
    program = rewritten(module, x, bits=bits, rank=rank, group_size=group_size)
    result = lopro_fx.optimize(program)
    left = {note["what"][0]: note.get("reason") for note in notes(result) if note["pass"] == "fold_permutation"}
    assert set(left) == {"a", "gate", "down"}
    assert left["gate"] is None
    assert "is also read by 'output'" in str(left["down"])
    assert_same(program, result, x)
