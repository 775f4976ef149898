"""Weights that are no parameter of one module: buffers, and tensors that several Linears share."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lopro_fx
from lopro_fx import RTN, LoPRo
from lopro_fx.commands.target import Target
from lopro_fx.layer import dense_weight
from lopro_fx.passes.linears import as_linears
from lopro_fx.selection import select
from tests.helpers import TOLERANCE, assert_close
from tests.programs import WIDTH, export, rows, seeded

CONFIG = LoPRo(bits=4, group_size=32, rank=2, clip_steps=4, refits=0, sweeps=0)


class Frozen(nn.Module):
    """A Linear whose weight is a buffer, before one whose weight is a parameter."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.fixed = nn.Module()
        self.fixed.register_buffer("weight", seeded(nn.Linear(WIDTH, WIDTH)).weight.detach().clone(), persistent)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(functional.linear(x, self.fixed.weight)))


class Constant(nn.Module):
    """The same with a tensor that no module registers."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)
        self.table = [seeded(nn.Linear(WIDTH, WIDTH)).weight.detach().clone()]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(functional.linear(x, self.table[0])))


@pytest.mark.parametrize("kind", ["persistent", "non-persistent", "constant"])
def test_a_weight_may_be_a_buffer_or_a_constant(kind: str, tmp_path: Path) -> None:
    module = seeded(Constant() if kind == "constant" else Frozen(kind == "persistent"))
    program = export(module, rows(4))
    taken = {line.name for line in lopro_fx.explain(program).taken}
    assert len(taken) == 2
    Target(tmp_path / "out").require_space(program, select(as_linears(program), CONFIG), CONFIG)
    for batches in ([rows(4, seed=seed) for seed in range(4)], None):
        states = [lopro_fx.calibrate(program, batches, CONFIG, resume=tmp_path / f"{batches is None}")
                  for _ in range(2)]  # fmt: skip
        assert set(states[1].layers) == taken
        result = lopro_fx.apply(program, states[1])
        twin = copy.deepcopy(module)
        with torch.no_grad():
            for site in states[1].layers.values():
                dense = dense_weight(states[1].inputs[site.input], site)
                if kind == "constant" and site.name != "last":
                    twin.table = [dense]
                else:
                    twin.get_submodule(site.name).weight.copy_(dense)
            assert_close(kind, twin(rows(4)), result.module()(rows(4)), 1e-5)
        assert not [name for name in (*result.state_dict, *result.constants) if name.endswith(("weight", "table_0"))]
        lopro_fx.save(result, tmp_path / "program")
        loaded = lopro_fx.load(tmp_path / "program")
        with torch.no_grad():
            assert torch.equal(loaded.module()(rows(4)), result.module()(rows(4)))


class Shared(nn.Module):
    """One weight in two Linears with biases of their own, in an order that doesn't say which of them names it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("strict", [False, True])
def test_linears_that_share_a_weight_keep_their_biases(strict: bool) -> None:
    module = seeded(Shared())
    program = torch.export.export(module, (rows(4),), strict=strict)
    state = lopro_fx.calibrate(program, [rows(4)], CONFIG)
    (site,) = state.layers.values()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.one.weight.copy_(dense_weight(state.inputs[site.input], site))
        expected = twin(rows(4))
        for strictly in (False, True):
            again = torch.export.export(module, (rows(4),), strict=strictly)
            result = lopro_fx.apply(again, state)
            assert_close("output", expected, result.module()(rows(4)), 1e-5)
            assert not [name for name in result.state_dict if name.endswith("weight")]
            fast = lopro_fx.optimize(result, target="cpu", activations="float")
            assert_close("optimised", expected, fast.module()(rows(4)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_in_every_spelling(dtype: torch.dtype) -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.last.bias, x @ self.first.weight.T + self.first.bias, self.last.weight)

    module = seeded(Spelled()).to(dtype)
    program = export(module, rows(4).to(dtype))
    if dtype == torch.float64:
        explanation = lopro_fx.explain(program)
        assert not explanation.taken
        assert {line.name: "float64" in line.reason for line in explanation.skipped} == {"first": True, "last": True}
        return
    state = lopro_fx.calibrate(program, None, RTN(bits=8, group_size=32))
    assert set(state.layers) == {"first", "last"}
    result = lopro_fx.apply(program, state)
    first, last = (dense_weight(state.inputs[state.layers[name].input], state.layers[name]).double()
                   for name in ("first", "last"))  # fmt: skip
    with torch.no_grad():
        got = result.module()(rows(4).to(dtype))
        hidden = rows(4).to(dtype).double() @ first.T + module.first.bias.double()
        # The second weight is that of `addmm`, stored transposed.
        assert_close(str(dtype), hidden @ last.T + module.last.bias.double(), got, 2 * TOLERANCE[dtype])
        assert got.dtype == dtype
