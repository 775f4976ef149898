"""Packed Linears of one input become one: the same rows, bit for bit, in fewer nodes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lopro_fx.kernels.formats.affine.packing.format import dequantize
from lopro_fx.kernels.project.reference import dense_factor
from lopro_fx.passes.base import counters
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.merge import MergeLinearsPass
from lopro_fx.passes.record import META
from lopro_fx.passes.rewrite import RewritePass
from tests.helpers import generator
from tests.passes.packs import packed
from tests.passes.quantised import (
    PACKED_LINEAR,
    assert_same,
    assert_unchanged_by,
    calls,
    notes,
    quantised,
    reasons,
    rewritten,
    run,
)
from tests.programs import WIDTH, Twice, export, ids, rows, seeded

CONTIGUOUS = torch.ops.aten.contiguous.default


class Pair(nn.Module):
    """Two Linears of one input, the second biased or not, given to `join`."""

    def __init__(self, join, first: int = WIDTH, second: int = WIDTH, width: int = WIDTH, bias: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, first), nn.Linear(width, second, bias=bias)
        self.join = join

    def forward(self, x: Tensor):
        return self.join(self.first(x), self.second(x))


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a * 2, torch.relu(b)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("transform", ["identity", "act_order", "partial", "full"])
def test_results_are_the_same(transform: str, rank: int, bits: int) -> None:
    program = quantised(transform, rank, bits)
    before = counters.copy()
    merged = MergeLinearsPass()(program)
    assert counters["merge.group"] - before["merge.group"] == 2
    assert counters["merge.linear"] - before["merge.linear"] == 5
    assert len(calls(merged, PACKED_LINEAR)) == 4
    for shape in ((2, 9), (1, 1), (3, 17)):
        assert_same(program, merged, ids(*shape))


def test_the_rows_are_those_of_the_members_bit_for_bit() -> None:
    program = quantised(bias=False)
    state, merged = program.state_dict, MergeLinearsPass()(program).state_dict
    for owner, names in {"blocks.0.q": "qkv", "blocks.0.gate": ("gate", "up")}.items():
        members = [f"blocks.0.{name}" for name in names]
        dense = [dequantize(*(state[f"{name}.{key}"] for key in ("codes", "scales", "zeros")), 3, 32, WIDTH,
                            torch.float32) for name in members]  # fmt: skip
        together = [merged[f"{owner}.merged.{key}"] for key in ("codes", "scales", "zeros")]
        assert torch.equal(dequantize(*together, 3, 32, WIDTH, torch.float32), torch.cat(dense))
        ups = [dense_factor(state[f"{name}.up"], state[f"{name}.up_scale"], 1) for name in members]
        factor = dense_factor(merged[f"{owner}.merged.up"], merged[f"{owner}.merged.up_scale"], 1)
        assert torch.equal(factor, torch.cat(ups))
        assert merged[f"{owner}.merged.up_scale"].shape == (len(members), 2)
        assert f"{owner}.merged.bias" not in merged


def test_members_leave_the_program_and_the_rest_stays() -> None:
    program = quantised()
    merged = MergeLinearsPass()(program)
    members = tuple(f"blocks.0.{name}." for name in ("q", "k", "v", "gate", "up"))
    gone = set(program.state_dict) - set(merged.state_dict)
    assert gone == {f"{name}{key}" for name in members
                    for key in ("codes", "scales", "zeros", "bias", "up", "up_scale")}  # fmt: skip
    new = set(merged.state_dict) - set(program.state_dict)
    assert all(name.startswith(("blocks.0.q.merged.", "blocks.0.gate.merged.")) for name in new)
    buffers = set(merged.graph_signature.inputs_to_buffers.values())
    assert new <= buffers
    assert not gone & (buffers | set(merged.graph_signature.inputs_to_parameters.values()))


def test_scales_that_agree_stay_one_row() -> None:
    program = export(seeded(Pair(_pair)), rows(4))
    groups, sites = packed(program)
    merged = MergeLinearsPass()(RewritePass(groups, sites, {})(program))
    assert merged.state_dict["first.merged.up_scale"].shape == (2,)
    # Only the first member is biased.
    assert not merged.state_dict["first.merged.bias"][WIDTH:].any()


def test_new_nodes_say_what_they_are() -> None:
    merged = MergeLinearsPass()(quantised())
    node = calls(merged, PACKED_LINEAR)[0]
    sites = ["blocks.0.q", "blocks.0.k", "blocks.0.v"]
    assert node.meta[META] == {"sites": sites, "group": "blocks.0.q"}
    assert [part.meta[META]["sites"] for part in node.users] == [[name] for name in sites]
    for new in (node, *node.users):
        assert new.meta["stack_trace"]
        # It computes several modules, so it belongs to the one around them.
        assert [entry[0] for entry in new.meta["nn_module_stack"].values()][-1] == "blocks.0"
    assert notes(merged)[0] == {"pass": "merge", "what": sites, "into": "blocks.0.q.merged"}
    assert reasons(merged)["blocks.0.o"] == "no other Linear reads its input"


def test_the_input_program_is_not_changed() -> None:
    assert_unchanged_by(MergeLinearsPass(), quantised())


@pytest.mark.parametrize("contiguous", [False, True])
def test_views_that_need_a_contiguous_result_get_one(contiguous: bool) -> None:
    def join(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if contiguous:
            return a.view(-1), b.view(b.shape[0], -1)
        heads = b.view(*b.shape[:2], 4, -1).transpose(1, 2)
        return heads, a.chunk(2, -1)[1].unsqueeze(1)

    program = rewritten(seeded(Pair(join)), rows(2, 9), dynamic=True)
    merged = MergeLinearsPass()(program)
    assert len(calls(merged, CONTIGUOUS)) == (2 if contiguous else 0)
    assert_same(program, merged, rows(3, 5))
    outputs = merged.graph.output_node().args[0]
    for node, got in zip(outputs, run(merged, rows(2, 9)), strict=True):
        assert isinstance(node, torch.fx.Node)
        value = node.meta["val"]
        assert len(value.shape) == got.dim()
        assert [int(stride.node.hint) if isinstance(stride, torch.SymInt) else stride for stride in value.stride()] == [
            *got.stride()
        ]


@pytest.mark.parametrize("viewed", [False, True])
def test_results_that_the_program_returns_are_merged_too(viewed: bool) -> None:
    def join(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (a, b, b.view(-1)) if viewed else (a, b)

    program = rewritten(seeded(Pair(join)), rows(4))
    merged = MergeLinearsPass()(program)
    assert len(calls(merged, PACKED_LINEAR)) == 1
    assert_same(program, merged, rows(4, seed=1))


def test_results_can_be_written_in_place() -> None:
    def join(a: Tensor, b: Tensor) -> Tensor:
        return a.mul_(2) + b.relu_()

    program = rewritten(seeded(Pair(join)), rows(4))
    merged = MergeLinearsPass()(program)
    assert len(calls(merged, PACKED_LINEAR)) == 1
    assert_same(program, merged, rows(4, seed=1))
    # Autograd allows it as well.
    merged.module()(rows(4).requires_grad_()).sum().backward()


def test_different_widths_are_not_mixed() -> None:
    program = export(seeded(Pair(_pair)), rows(4))
    groups, sites = packed(program, bits=4)
    _, others = packed(program, bits=3, group_size=-1)
    mixed = RewritePass(groups, {**sites, "second": others["second"]}, {})(program)
    merged = MergeLinearsPass()(mixed)
    assert reasons(merged)["first"] == "the other Linears that read its input differ in bits, group size"
    assert len(calls(merged, PACKED_LINEAR)) == 2
    assert_same(mixed, merged, rows(4, seed=1), ratio=0)


def test_a_weight_that_is_applied_twice_is_not_stored_twice() -> None:
    program = rewritten(seeded(Twice()), rows(4))
    before = counters["merge.group"]
    merged = MergeLinearsPass()(program)
    assert counters["merge.group"] == before
    assert reasons(merged) == {"shared": "its weight is applied more than once",
                               "other": "no other Linear reads its input"}  # fmt: skip


def test_a_merged_linear_can_be_merged_again() -> None:
    class Three(Pair):
        def __init__(self) -> None:
            super().__init__(_pair, 32, 64)
            self.third = nn.Linear(WIDTH, 32)

        def forward(self, x: Tensor):
            return *super().forward(x), self.third(x)

    program = rewritten(seeded(Three()), rows(4))
    editor = ProgramEditor(program)
    (codes,) = [node for node in editor.graph.nodes if node.name == "b_third_codes"]
    editor.add_call(editor.graph.output_node(), "reader", torch.ops.aten.neg.default, (codes,), codes)
    once = MergeLinearsPass()(editor.finish())
    assert once.state_dict["first.merged.up_scale"].shape == (3, 2)
    editor = ProgramEditor(once)
    (reader,) = [node for node in editor.graph.nodes if node.name == "reader"]
    editor.graph.erase_node(reader)
    twice = MergeLinearsPass()(editor.finish())
    assert twice.state_dict["first.merged.merged.up_scale"].shape == (4, 2)
    assert_same(program, twice, rows(4, seed=1))


def test_scales_of_the_factors_may_not_weigh_more_than_the_merge_is_worth() -> None:
    program = rewritten(seeded(Pair(_pair, 33, 40)), rows(4), rank=8)
    assert "more bytes, for scales of their factors" in reasons(MergeLinearsPass()(program))["first"]
    assert not reasons(MergeLinearsPass()(rewritten(seeded(Pair(_pair, 33, 40)), rows(4), rank=0)))


def test_a_bias_that_the_program_computes_is_left() -> None:
    class Doubled(Pair):
        def forward(self, x: Tensor):
            return self.first(x) + functional.linear(x, self.second.weight, self.first.bias * 2)

    merged = MergeLinearsPass()(rewritten(seeded(Doubled(_pair)), rows(4)))
    assert reasons(merged)["second"] == "its bias is computed by the program"


def test_an_input_that_is_written_in_between_is_left() -> None:
    class Writer(Pair):
        def __init__(self) -> None:
            super().__init__(_pair)
            self.register_buffer("state", torch.ones(4, WIDTH))

        def forward(self, x: Tensor):
            whole = self.state + x
            part = whole[1:]
            y = self.first(whole)
            part.mul_(2)
            return y, self.second(whole)

    program = rewritten(seeded(Writer()), rows(4), rotate=False, rank=0)
    merged = MergeLinearsPass()(program)
    assert reasons(merged)["first"] == "the program writes into their input between them"
    assert_same(program, merged, rows(4, seed=1), ratio=0)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.sampled_from([2, 3, 4, 8]), st.integers(0, 3),
       st.sampled_from([32, -1]))  # fmt: skip
def test_any_sizes(width: int, first: int, second: int, bits: int, rank: int, group_size: int) -> None:
    x = torch.randn(3, width, generator=generator())
    program = rewritten(seeded(Pair(_pair, first, second, width)), x, bits=bits, rank=rank, group_size=group_size)
    merged = MergeLinearsPass()(program)
    fewer = not reasons(merged)
    assert len(calls(merged, PACKED_LINEAR)) == 2 - fewer
    assert_same(program, merged, x)


def test_a_bias_that_members_share_is_dropped_once() -> None:
    module = seeded(Pair(_pair, bias=True))
    module.second.bias = module.first.bias
    program = rewritten(module, rows(4))
    merged = MergeLinearsPass()(program)
    assert len(calls(merged, PACKED_LINEAR)) == 1
    assert "first.merged.bias" in merged.state_dict
    assert_same(program, merged, rows(4, seed=1))
