"""Rotation, down-projection and packed Linear become one node where nothing else reads what is between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.export import ExportedProgram

from lopro_fx.passes.base import counters
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.fuse_site import FuseSitePass
from lopro_fx.passes.merge import MergeLinearsPass
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import META
from tests.helpers import generator
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
    reasons,
    rewritten,
)
from tests.programs import WIDTH, ids, rows, seeded


def _one(**options) -> ExportedProgram:
    return rewritten(seeded(nn.Sequential(nn.Linear(WIDTH, 8))), rows(4), **options)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("transform", ["act_order", "partial", "full"])
def test_every_site_of_its_own_input_is_fused(transform: str, rank: int, bits: int) -> None:
    program, before = quantised(transform, rank, bits), counters["fuse_site.site"]
    fused = FuseSitePass()(program)
    assert counters["fuse_site.site"] - before == len(calls(fused, PACKED_SITE)) == 2
    readers = 3 + bool(rank)
    assert reasons(fused) == {
        f"blocks.0.{name}": f"its {'down-projection' if rank else 'rotation'} is shared by {count} readers"
        for name, count in (("q", 3), ("k", 3), ("v", 3), ("gate", 2), ("up", 2))
    }
    assert len(calls(fused, ROTATE)) == 2
    assert len(calls(fused, PACKED_LINEAR)) == 5
    assert all(len(node.users) in (readers, readers - 1) for node in calls(fused, ROTATE))
    for shape in ((2, 9), (1, 1), (3, 17)):
        assert_same(program, fused, ids(*shape), ratio=0)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("transform", ["identity", "act_order", "partial", "full"])
def test_after_a_merge_all_are_fused(transform: str, rank: int) -> None:
    program = quantised(transform, rank)
    fused = FuseSitePass()(MergeLinearsPass()(program))
    plain = transform == "identity" and rank == 0
    assert len(calls(fused, PACKED_SITE)) == (0 if plain else 4)
    assert len(calls(fused, PACKED_LINEAR)) == (4 if plain else 0)
    assert not calls(fused, ROTATE)
    assert not calls(fused, PROJECT)
    assert_same(program, fused, ids(3, 5))
    if plain:
        assert reasons(fused)["blocks.0.down"] == "it has neither a rotation nor a low-rank branch"


def test_the_node_says_what_it_is() -> None:
    fused = FuseSitePass()(MergeLinearsPass()(quantised()))
    first, second, *_ = calls(fused, PACKED_SITE)
    assert first.meta[META] == {"sites": [f"blocks.0.{name}" for name in "qkv"], "group": "blocks.0.q"}
    assert second.meta[META] == {"sites": ["blocks.0.o"], "group": "blocks.0.o"}
    assert second.meta["stack_trace"]
    assert [entry[0] for entry in second.meta["nn_module_stack"].values()][-1] == "blocks.0.o"
    assert {"pass": "fuse_site", "what": ["blocks.0.o"]} in notes(fused)


def test_the_input_program_is_not_changed() -> None:
    assert_unchanged_by(FuseSitePass(), quantised())


@pytest.mark.parametrize(("target", "part"), [(ROTATE, "rotation"), (PROJECT, "down-projection")])
def test_a_value_with_another_reader_stays(target, part: str) -> None:
    editor = ProgramEditor(_one())
    (node,) = editor.graph.find_nodes(op="call_function", target=target)
    output = editor.graph.output_node()
    editor.add_call(output, "reader", torch.ops.aten.sin.default, (node,), node)
    program = editor.finish()
    fused = FuseSitePass()(program)
    assert not calls(fused, PACKED_SITE)
    assert reasons(fused)["0"] == f"its {part} is shared by {len(node.users)} readers"


def test_a_branch_of_another_input_stays() -> None:
    editor = ProgramEditor(_one())
    (project,) = editor.graph.find_nodes(op="call_function", target=PROJECT)
    (rotate,) = editor.graph.find_nodes(op="call_function", target=ROTATE)
    operands(project).replace(x=operands(rotate).x).write(project)
    program = editor.finish()
    fused = FuseSitePass()(program)
    assert reasons(fused) == {"0": "its low-rank branch does not project its own input"}
    assert_same(program, fused, rows(4, seed=1), ratio=0)


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([2, 3, 4, 8]), st.integers(0, 3), st.booleans(),
       st.sampled_from([32, -1]))  # fmt: skip
def test_any_sizes(width: int, out: int, bits: int, rank: int, rotate: bool, group_size: int) -> None:
    x, module = torch.randn(3, width, generator=generator()), seeded(nn.Sequential(nn.Linear(width, out)))
    program = rewritten(module, x, bits=bits, rank=rank, rotate=rotate, group_size=group_size)
    fused = FuseSitePass()(program)
    assert len(calls(fused, PACKED_SITE)) == bool(rotate or rank)
    assert_same(program, fused, x, ratio=0)
