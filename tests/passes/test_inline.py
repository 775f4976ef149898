"""Nested graphs that only switch a mode become part of the graph around them."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, nn

from lopro_fx.passes.base import counters
from lopro_fx.passes.inline import InlineModesPass
from lopro_fx.passes.sites import find_sites
from tests.helpers import assert_close
from tests.programs import WIDTH, Nested, decoder, export, rows, seeded


class Deep(nn.Module):
    """A nested graph in a nested graph, whose result is the program's own output."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = self.outer(x)
            with torch.autocast("cpu", enabled=False):
                z = self.inner(torch.relu(y))
            return z, y * 2


def _run(program: torch.export.ExportedProgram, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result = program.module()(x)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("module", [Nested(None), Nested(False), Deep()])
def test_the_result_is_flat_and_computes_the_same(module: nn.Module) -> None:
    program = export(seeded(module), rows(4))
    assert any("wrap_with" in str(node.target) for node in program.graph.nodes)
    flat = InlineModesPass()(program)
    assert not any("wrap_with" in str(node.target) or node.op == "get_attr" for node in flat.graph.nodes)
    assert not any(node.target is operator.getitem for node in flat.graph.nodes)
    names = {name for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    assert {site.name for site in find_sites(flat).sites} == names
    for got, want in zip(_run(flat, rows(4, seed=1)), _run(program, rows(4, seed=1)), strict=True):
        assert torch.equal(got, want)


def test_an_enabled_autocast_stays_nested() -> None:
    program = export(seeded(Nested(True)), rows(4))
    assert InlineModesPass()(program) is program


def test_a_flat_program_is_returned_as_it_is() -> None:
    _, program = decoder()
    before = counters["inline.nested_graph"]
    assert InlineModesPass()(program) is program
    assert counters["inline.nested_graph"] == before


def test_the_input_keeps_its_nested_graph() -> None:
    program = export(seeded(Deep()), rows(4))
    code, before = program.graph_module.code, counters["inline.nested_graph"]
    flat = InlineModesPass()(program)
    assert counters["inline.nested_graph"] - before == 2
    assert program.graph_module.code == code
    assert_close("input program", _run(flat, rows(4))[0], _run(program, rows(4))[0], 0)
