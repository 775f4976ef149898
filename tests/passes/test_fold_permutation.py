"""Permutations move into the rows of the Linears before, where every column goes its own way in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

import lopro_fx
from lopro_fx.kernels.formats.affine.packing.format import dequantize
from lopro_fx.passes.base import counters
from lopro_fx.passes.fold_permutation import FoldPermutationPass
from lopro_fx.passes.merge import MergeLinearsPass
from lopro_fx.passes.operands import operands
from tests.helpers import generator
from tests.passes.quantised import (
    PACKED_LINEAR,
    ROTATE,
    assert_same,
    assert_unchanged_by,
    calls,
    notes,
    quantised,
    reasons,
    rewritten,
)
from tests.programs import WIDTH, decoder, ids, rows, seeded

HIDDEN = 48


class Gated(nn.Module):
    """down(join(gate(x), up(x))), and what `join` returns after the first value."""

    def __init__(self, join: Callable, width: int = WIDTH, hidden: int = HIDDEN, bias: bool = True) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=bias), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.scale = nn.Parameter(torch.ones(hidden))
        self.join = join

    def forward(self, x: Tensor):
        joined = self.join(self.gate(x), self.up(x), self)
        return (self.down(joined[0]), *joined[1:]) if isinstance(joined, tuple) else self.down(joined)


def _gated(a: Tensor, b: Tensor, _: nn.Module) -> Tensor:
    return functional.silu(a) * b


def _permutations(program: ExportedProgram) -> list[str]:
    return [node.name for node in calls(program, ROTATE) if operands(node).perm is not None]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rank", "bias"), [(0, False), (2, True)])
@pytest.mark.parametrize("transform", ["act_order", "partial"])
def test_results_are_the_same(transform: str, rank: int, bias: bool, bits: int) -> None:
    program, before = quantised(transform, rank, bits, bias), counters.copy()
    folded = FoldPermutationPass()(program)
    assert counters["fold_permutation.rotate"] - before["fold_permutation.rotate"] == 1
    assert counters["fold_permutation.linear"] - before["fold_permutation.linear"] == 2
    assert len(_permutations(folded)) == 3
    # A rotation that only permutes goes altogether.
    assert len(calls(folded, ROTATE)) == (3 if transform == "act_order" else 4)
    assert set(program.state_dict) - set(folded.state_dict) == {"blocks.0.down.perm"}
    assert not set(folded.state_dict) - set(program.state_dict)
    for shape in ((2, 9), (1, 1), (3, 17)):
        assert_same(program, folded, ids(*shape))


@pytest.mark.parametrize("transform", ["identity", "full"])
def test_without_permutations_there_is_nothing_to_do(transform: str) -> None:
    program = quantised(transform)
    folded = FoldPermutationPass()(program)
    assert folded.graph_module.code == program.graph_module.code
    assert not notes(folded)


def test_gptq_in_act_order() -> None:
    config = lopro_fx.GPTQ(bits=3, group_size=32, act_order="column", clip_steps=2)
    program = lopro_fx.quantize(decoder(depth=1)[1], [ids()], config)
    folded = FoldPermutationPass()(program)
    assert len(calls(folded, ROTATE)) == 3
    assert_same(program, folded, ids(3, 5))


def test_rows_are_permuted_bit_for_bit() -> None:
    program = quantised()
    before, after = program.state_dict, FoldPermutationPass()(program).state_dict
    perm = before["blocks.0.down.perm"].long()
    assert not torch.equal(perm, torch.arange(HIDDEN))
    for name in ("blocks.0.gate", "blocks.0.up"):
        dense = [dequantize(*(state[f"{name}.{key}"] for key in ("codes", "scales", "zeros")), 3, 32, WIDTH,
                            torch.float32) for state in (before, after)]  # fmt: skip
        assert torch.equal(dense[1], dense[0][perm])
        for key in ("up", "bias"):
            assert torch.equal(after[f"{name}.{key}"], before[f"{name}.{key}"][perm])
        assert isinstance(after[f"{name}.bias"], nn.Parameter)
        assert after[f"{name}.bias"].requires_grad
        assert after[f"{name}.up_scale"] is before[f"{name}.up_scale"]


def test_the_record_says_whose_rows_and_why_not() -> None:
    folded = FoldPermutationPass()(quantised())
    done = {"pass": "fold_permutation", "what": ["blocks.0.down"], "rows_of": ["blocks.0.gate", "blocks.0.up"]}
    assert done in notes(folded)
    assert set(reasons(folded)) == {f"blocks.0.{name}" for name in ("q", "o", "gate")}
    assert "'scaled_dot_product_attention', which is neither" in reasons(folded)["blocks.0.o"]


def test_the_input_program_is_not_changed() -> None:
    assert_unchanged_by(FoldPermutationPass(), quantised())


FOLDED: dict[str, Callable] = {
    "gelu": lambda a, b, m: functional.gelu(a, approximate="tanh") * b,
    "relu": lambda a, b, m: torch.relu(a) - b,
    "tanh": lambda a, b, m: torch.tanh(a) + torch.sigmoid(-b),
    "squared relu": lambda a, b, m: torch.relu(a) ** 2 * 0.5 + b / 3,
    "casts": lambda a, b, m: (functional.silu(a.double()) * b.double()).float(),
    "a scalar for each row": lambda a, b, m: a * b * torch.sigmoid(torch.full((*a.shape[:2], 1), 0.5)),
    "one value twice": lambda a, b, m: (a + b) * (a + b) + a,
    "one Linear": lambda a, b, m: functional.silu(a),
}


@pytest.mark.parametrize("name", FOLDED)
def test_elementwise_operators_are_passed(name: str) -> None:
    program = rewritten(seeded(Gated(FOLDED[name])), rows(2, 4), dynamic=True)
    folded = FoldPermutationPass()(program)
    assert _permutations(folded) == ["rotate_linear"]
    assert_same(program, folded, rows(3, 5, seed=1))


KEPT: dict[str, tuple[Callable, str]] = {
    "a parameter": (lambda a, b, m: a * m.scale, "'p_scale', which is neither a packed Linear nor elementwise"),
    "softmax": (lambda a, b, m: a.softmax(-1) * b, "'softmax', which is neither a packed Linear nor elementwise"),
    "roll": (lambda a, b, m: torch.relu(a.roll(1, -1)) * b, "'roll', which is neither"),
    "returned": (lambda a, b, m: (_gated(a, b, m), b), "is also read by 'output', which needs the original order"),
    "product returned": (lambda a, b, m: (x := a * b, x), "'mul' is also read by 'output'"),
    "read elsewhere": (lambda a, b, m: (_gated(a, b, m), a.sum(-1)), "is also read by 'sum_1', which needs"),
    "written": (lambda a, b, m: functional.silu(a, inplace=True) * b, "'silu_', which is neither"),
    "broadcast outwards": (lambda a, b, m: a[..., :1] * b + a, "is also read by 'slice_1'"),
}


@pytest.mark.parametrize("name", KEPT)
def test_anything_else_is_left(name: str) -> None:
    join, reason = KEPT[name]
    program, before = rewritten(seeded(Gated(join)), rows(4)), counters["fold_permutation.rotate"]
    folded = FoldPermutationPass()(program)
    assert counters["fold_permutation.rotate"] == before
    assert reason in reasons(folded)["down"]
    assert_same(program, folded, rows(4, seed=1), ratio=0)


def test_linears_in_a_row_are_each_permuted_for_the_next() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, 56), nn.GELU(), nn.Linear(56, 8))
    program = rewritten(seeded(module), rows(4))
    folded = FoldPermutationPass()(program)
    assert len(_permutations(folded)) == 1
    assert_same(program, folded, rows(4, seed=1))


class Shared(nn.Module):
    """One Linear applied to x and its negative; `outside` also returns it of another tensor."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.shared, self.down, self.outside = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), outside

    def forward(self, x: Tensor):
        y = self.down(torch.relu(self.shared(x)) * self.shared(-x))
        return (y, self.shared(x * 2)) if self.outside else y


def test_a_weight_that_is_used_twice_is_permuted_once() -> None:
    program = rewritten(seeded(Shared(False)), rows(4))
    folded = FoldPermutationPass()(program)
    assert not reasons(folded).get("down")
    assert_same(program, folded, rows(4, seed=1))


def test_a_weight_that_is_used_elsewhere_stays() -> None:
    program = rewritten(seeded(Shared(True)), rows(4))
    folded = FoldPermutationPass()(program)
    assert reasons(folded)["down"] == "the weight or bias of 'shared' is also applied elsewhere"
    assert_same(program, folded, rows(4, seed=1), ratio=0)


def test_a_bias_that_the_program_computes_is_left() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(functional.linear(x, self.first.weight, self.first.bias * 2))

    folded = FoldPermutationPass()(rewritten(seeded(Doubled()), rows(4)))
    assert reasons(folded)["last"] == "the bias of 'first' is computed by the program"


def test_after_a_merge_rows_are_hidden() -> None:
    merged = MergeLinearsPass()(rewritten(seeded(Gated(_gated)), rows(4)))
    assert len(calls(merged, PACKED_LINEAR)) == 2
    folded = FoldPermutationPass()(merged)
    assert "which is neither a packed Linear nor elementwise" in reasons(folded)["down"]
    assert_same(merged, folded, rows(4, seed=1), ratio=0)


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([2, 3, 4, 8]), st.integers(0, 3), st.booleans(),
       st.sampled_from([32, -1]))  # fmt: skip
def test_any_sizes(width: int, hidden: int, bits: int, rank: int, bias: bool, group_size: int) -> None:
    x, module = torch.randn(3, width, generator=generator()), seeded(Gated(_gated, width, hidden, bias))
    program = rewritten(module, x, bits=bits, rank=rank, group_size=group_size)
    folded = FoldPermutationPass()(program)
    assert _permutations(folded) == ["rotate_linear"]
    assert_same(program, folded, x)
