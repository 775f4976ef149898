"""Sums behind a site become an operand of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from lopro_fx.passes.base import counters
from lopro_fx.passes.fuse_residual import FuseResidualPass
from lopro_fx.passes.fuse_site import FuseSitePass
from lopro_fx.passes.merge import MergeLinearsPass
from lopro_fx.passes.record import META
from tests.passes.quantised import PACKED_SITE, assert_same, assert_unchanged_by, calls, notes, reasons, rewritten
from tests.programs import WIDTH, Block, rows, seeded

NAME = FuseResidualPass.name
Combine = Callable[[Tensor, Tensor], Tensor]


class Summed(nn.Module):
    """What `combine` makes of an input and a Linear of it."""

    def __init__(self, combine: Combine) -> None:
        super().__init__()
        self.linear, self.combine = nn.Linear(WIDTH, WIDTH), combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.linear(x))


class Late(nn.Module):
    """The summand is computed after the Linear, or the Linear's input is written before the sum."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.linear, self.writes = nn.Linear(WIDTH, WIDTH), writes

    def forward(self, x: Tensor) -> Tensor:
        value = torch.cos(x)
        y = self.linear(value)
        if self.writes:
            value.add_(1)
        return y + torch.sin(value)


class Parallel(nn.Module):
    """Two Linears of different inputs, both added to the first of these."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.first(x) + self.second(torch.sin(x)))


def prepared(module: nn.Module, *args: Tensor, dynamic: bool = False, **options) -> ExportedProgram:
    program = rewritten(seeded(module), *args, dynamic=dynamic, **options)
    return FuseSitePass()(MergeLinearsPass()(program))


def fused(program: ExportedProgram) -> ExportedProgram:
    result = FuseResidualPass()(program)
    result.validate()
    return result


def test_residuals_of_a_block() -> None:
    program, before = prepared(Block(), rows(2, 9), dynamic=True), counters["fuse_residual.site"]
    result = fused(program)
    assert counters["fuse_residual.site"] - before == 2
    with_residual = [node.meta[META]["sites"] for node in calls(result, PACKED_SITE) if "residual" in node.kwargs]
    assert with_residual == [["o"], ["down"]]
    assert not calls(result, torch.ops.aten.add.Tensor)
    assert {"pass": "fuse_residual", "what": ["o"]} in notes(result)
    assert reasons(result, NAME)["q"] == "its result has 3 readers"
    for shape in ((2, 9), (1, 1), (3, 17)):
        assert_same(program, result, rows(*shape, seed=1))


@pytest.mark.parametrize(("combine", "reason"), [
    (lambda x, y: x + y, None),
    (lambda x, y: y + x, None),
    (lambda x, y: x + functional.dropout(functional.dropout(y, 0.1, False), 0.0, True), None),
    (lambda x, y: torch.add(x, y, alpha=2), "'add' reads its result, which is no sum"),
    (lambda x, y: y + 1.0, "'add' adds no other tensor"),
    (lambda x, y: y + y, "'add' adds no other tensor"),
    (lambda x, y: y + x[:1], "'add' broadcasts"),
    (lambda x, y: y + x.double(), "'add' adds torch.float64 to torch.float32"),
    (lambda x, y: x - y, "'sub' reads its result, which is no sum"),
    (lambda x, y: (y + x) * y, "its result has 2 readers"),
])  # fmt: skip
def test_sums_alone_are_fused(combine: Combine, reason: str | None) -> None:
    program = prepared(Summed(combine), rows(4))
    result = fused(program)
    assert reasons(result, NAME).get("linear") == reason
    assert ("residual" in calls(result, PACKED_SITE)[0].kwargs) == (reason is None)
    assert_same(program, result, rows(4, seed=1))


@pytest.mark.parametrize("writes", [False, True])
def test_a_site_moves_to_its_sum_if_nothing_is_written_before(writes: bool) -> None:
    program = prepared(Late(writes), rows(4))
    result = fused(program)
    assert reasons(result, NAME) == ({"linear": "the program writes into its input before the sum"} if writes else {})
    assert_same(program, result, rows(4, seed=1), ratio=0 if writes else 2e-6)


def test_one_of_two_sites_takes_the_other() -> None:
    program = prepared(Parallel(), rows(4))
    result = fused(program)
    second, first = calls(result, PACKED_SITE)
    assert first.kwargs == {"residual": second}
    assert reasons(result, NAME)["second"] == f"'{first.name}' reads its result, which is no sum"
    assert_same(program, result, rows(4, seed=1))


def test_the_input_program_is_not_changed() -> None:
    assert_unchanged_by(fused, prepared(Block(), rows(2, 9)))


def test_a_second_run_changes_nothing() -> None:
    once = fused(prepared(Block(), rows(2, 9)))
    assert fused(once).graph_module.code == once.graph_module.code
