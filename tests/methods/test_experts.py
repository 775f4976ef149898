"""Methods on experts: every method and format, shared transforms, branches, and TileQ's shared factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lopro_fx.errors import ConfigError
from lopro_fx.layer import Transform, dense_weight
from lopro_fx.methods.base import Context, Method, Solved, Unit
from lopro_fx.methods.experts import solve_experts, stacked
from lopro_fx.methods.flrq import FLRQ
from lopro_fx.methods.gptq import GPTQ
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.rtn import RTN
from lopro_fx.methods.tileq import TileQ
from lopro_fx.methods.verify import verified
from tests.helpers import generator, gram_of, heavy_tailed

COUNT, OUT, INNER = 4, 48, 64


def _unit(scale: float = 1.0) -> Unit:
    """Experts of a 2 x 2 grid that share what their rows and columns do, and differ a little."""
    rng = generator()
    down, up = torch.randn(2, 4, INNER, generator=rng), torch.randn(2, OUT, 4, generator=rng)
    weights = torch.stack([up[e % 2] @ torch.randn(4, 4, generator=rng) @ down[e // 2] for e in range(COUNT)]) / 4
    noise = torch.randn(COUNT, OUT, INNER, generator=rng) / 2
    return Unit("experts.up", ("experts.up",), [(weights + noise) * scale])


def _seen() -> Statistics:
    each = []
    for expert in range(COUNT):
        x = heavy_tailed(400, INNER, expert)
        values = {"gram": gram_of(x), "magnitude": x.abs().mean(0), "drift": torch.zeros(INNER, INNER)}
        each.append(Statistics(values, 400, 400, routed=400))
    mean = {key: sum(own.values[key] for own in each) / COUNT for key in each[0].values}
    return Statistics(mean, 1600, 1600, experts=tuple(each))


def _solve(method: Method, unit: Unit | None = None) -> Solved:
    unit = unit or _unit()
    return verified(method.name, unit, solve_experts(method, unit, _seen(), Context(torch.device("cpu"), generator())))


def _loss(solved: Solved, unit: Unit | None = None) -> float:
    unit = unit or _unit()
    error = unit.weights[0] - dense_weight(solved.input, solved.layers[0])
    grams = torch.stack([own.gram for own in _seen().experts])
    return torch.einsum("eij,ejk,eik->", error, grams, error).item()


METHODS = [
    RTN(bits=3, group_size=32), GPTQ(bits=3, group_size=32), LoPRo(bits=3, group_size=32, rank=4),
    FLRQ(bits=3, group_size=32), GPTQ(format="trellis", bits=2, window=12),
    LoPRo(format="trellis", bits=2, window=12, rank=0), TileQ(bits=3, group_size=32, tile_rank=4),
    TileQ(bits=3, group_size=32, tile_rank=4, core=False), TileQ(format="trellis", bits=2, window=12, tile_rank=4),
    TileQ.paper(bits=3, tile_rank=4, block_size=16, salient=16),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.format}")
def test_every_method_solves_experts(method: Method) -> None:
    solved = _solve(method)
    (layer,) = solved.layers
    assert layer.weight.shape == (COUNT, OUT, INNER)
    unit = _unit()
    assert _loss(solved) < 0.2 * torch.einsum(
        "eij,ejk,eik->", unit.weights[0], torch.stack([own.gram for own in _seen().experts]), unit.weights[0]
    )


def test_experts_are_rounded_by_their_own_statistics() -> None:
    together, unit = _solve(GPTQ(bits=3, group_size=32, act_order="none")), _unit()
    alone = GPTQ(bits=3, group_size=32, act_order="none").solve(
        unit.expert(2), _seen().experts[2], Context(torch.device("cpu"), generator())
    )
    for name, tensor in alone.layers[0].weight.tensors.items():
        assert torch.equal(together.layers[0].weight.tensors[name][2], tensor)


def test_branches_of_several_ranks_are_filled_with_zeros() -> None:
    unit, context = _unit(), Context(torch.device("cpu"), generator())
    each = [LoPRo(bits=2, group_size=32, rank=rank).solve(unit.expert(index), own, context)
            for index, (rank, own) in enumerate(zip((4, 2, 0, 3), _seen().experts, strict=True))]  # fmt: skip
    same = [replace(one, input=replace(one.input, transform=each[0].input.transform)) for one in each]
    solved = verified("test", unit, stacked(unit, same))
    dense = dense_weight(solved.input, solved.layers[0])
    for index, one in enumerate(same):
        assert torch.allclose(dense[index], dense_weight(one.input, one.layers[0]), atol=1e-5)
    assert solved.input.down is not None
    assert solved.input.down.rank == COUNT * 4


def test_tileq_stores_a_grid_and_beats_its_rounding_alone() -> None:
    with_tiles, without = (
        _solve(TileQ(bits=2, group_size=32, tile_rank=4)),
        _solve(LoPRo(bits=2, group_size=32, rank=0)),
    )
    layer = with_tiles.layers[0]
    assert layer.up is not None
    assert layer.core is not None
    assert layer.up.values.shape == (2, OUT, 4)
    assert layer.metrics["grid"] == [2, 2]
    assert _loss(with_tiles) < 0.8 * _loss(without)
    assert _loss(with_tiles) < _loss(_solve(TileQ(bits=2, group_size=32, tile_rank=4, core=False)))


def test_refits_never_lose() -> None:
    losses = [_solve(TileQ(bits=2, group_size=32, tile_rank=4, tile_refits=refits)).layers[0].metrics["relative_loss"]
              for refits in (0, 1, 3)]  # fmt: skip
    assert losses[2] <= losses[1] <= losses[0]


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_weights_of_any_size(scale: float) -> None:
    plain, far = (
        _solve(TileQ(bits=3, group_size=32, tile_rank=4)),
        _solve(TileQ(bits=3, group_size=32, tile_rank=4), _unit(scale)),
    )
    dense = [dense_weight(solved.input, solved.layers[0]) for solved in (plain, far)]
    assert torch.allclose(dense[0], dense[1] / scale, rtol=1e-4, atol=1e-5)


def test_an_override_applies_to_experts() -> None:
    method = RTN(bits=4, group_size=32, overrides={"experts.*": {"bits": 2}})
    assert _solve(method).layers[0].weight.spec["bits"] == 2


class _Turned(Method):
    """Gives each expert another transform, which can't be."""

    name = "turned"

    def solve(self, unit: Unit, seen: Statistics, context: Context) -> Solved:
        solved = RTN(bits=4, group_size=32).solve(unit, seen, context)
        perm: Tensor = torch.randperm(INNER, generator=context.generator).to(torch.int16)
        return replace(solved, input=replace(solved.input, transform=Transform(perm=perm)))


def test_a_method_that_turns_each_expert_differently_is_refused() -> None:
    with pytest.raises(ConfigError, match="its experts read one tensor"):
        _solve(_Turned())
