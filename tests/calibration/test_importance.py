"""The importance of tokens: the gradients that it stands for, and programs that have none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lopro_fx
from lopro_fx import GPTQ, CalibrationError, LoPRo
from lopro_fx.calibration.importance import Importance, measure_importance
from lopro_fx.passes.sites import find_sites
from tests.helpers import assert_close
from tests.programs import VOCAB, WIDTH, decoder, export, ids, rows, seeded


def _importance(program, *batches: Tensor, seed: int = 0) -> dict[str, Importance]:
    return measure_importance(program, find_sites(program, ("*",), ()).groups, [[batch] for batch in batches], seed)


def _expected(module: nn.Module, batches: list[Tensor], names: list[str]) -> Tensor:
    """Gradient norms of all tokens by autograd's own hooks on the module, each site's in units of its mean."""
    kept = {name: [] for name in names}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _m, _i, y, name=name: (
                y.register_hook(lambda g: kept[name].append(g.flatten(0, -2).square().sum(-1))) and None
            )
        )
        for name in names
    ]
    for batch in batches:
        logits, labels = module(batch)[:, :-1].flatten(0, -2), batch[:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return sum(torch.cat(kept[name]) / torch.cat(kept[name]).mean() for name in names).sqrt()


@pytest.mark.parametrize(("group", "names"), [("blocks.0.q", ["q", "k", "v"]), ("blocks.0.down", ["down"])])
def test_weights_are_gradient_norms_at_the_outputs_of_a_group(group: str, names: list[str]) -> None:
    module, program = decoder()
    batches = [ids(2, 9), ids(1, 5, seed=1)]
    weights = _importance(program, *batches)[group].tokens
    assert [len(each) for each in weights] == [18, 5]
    got, expected = torch.cat(weights), _expected(module, batches, [f"blocks.0.{name}" for name in names])
    # No token weighs nothing, so those that next to nothing depends on aren't in proportion.
    counted = expected > 0.1 * expected.mean()
    assert 0.5 < counted.double().mean() <= 1
    scale = got[counted].mean() / expected[counted].mean()
    assert_close("weights", expected[counted] * scale, got[counted], 1e-4)
    assert (got > 0).all()
    assert not counted.all() or got.min() > 0.05
    assert got[~counted].sum() < 0.1 * got.sum()
    assert got.mean().item() == pytest.approx(1, rel=1e-5)


def test_without_labels_they_are_drawn_from_the_seed() -> None:
    program = export(seeded(_LastToken()), rows(3, 8))
    first, again, other = (_importance(program, rows(3, 8), seed=seed) for seed in (0, 0, 1))
    for name, weights in first.items():
        for every in (torch.cat(weights.tokens), weights.rows):
            assert every.mean().item() == pytest.approx(1, rel=1e-5)
            assert (every > 0).all()
        assert torch.equal(weights.tokens[0], again[name].tokens[0])
        assert torch.equal(weights.rows, again[name].rows)
    assert any(not torch.equal(weights.rows, other[name].rows) for name, weights in first.items())


class _LastToken(nn.Module):
    """Only the last token reaches the logits; a write in place follows the Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu_()[:, -1])


def test_tokens_that_nothing_depends_on_weigh_next_to_nothing() -> None:
    (weights,) = _importance(export(seeded(_LastToken()), rows(3, 8)), rows(3, 8))["first"].tokens
    last = weights.view(3, 8)[:, -1]
    assert (last > 5 * weights.view(3, 8)[:, :-1].max()).all()


@pytest.mark.parametrize("method", [GPTQ, partial(LoPRo, rank=2)], ids=["gptq", "lopro"])
def test_weights_reach_the_gram(method: Callable[..., Any]) -> None:
    """Weighted towards the last token, a layer keeps that token's output better."""
    module = seeded(_LastToken())
    program = export(module, rows(3, 8))
    batches = [rows(3, 8, seed=i) for i in range(8)]
    errors = []
    for importance in ("none", "gradient"):
        config = method(bits=2, group_size=32, include="first", importance=importance)
        quantised = lopro_fx.quantize(program, batches, config).module()
        with torch.no_grad():
            errors.append(sum((quantised(x) - module(x)).square().sum() for x in batches).item())
    assert errors[1] < errors[0]


class _Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).argmax(-1)


def test_a_program_without_a_differentiable_output_is_refused() -> None:
    with pytest.raises(CalibrationError, match="importance='gradient'"):
        _importance(export(seeded(_Ids()), rows(2, 3)), rows(2, 3))


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_predictions_that_are_no_numbers_are_refused_by_their_batch(damage: float) -> None:
    damaged = rows(2, 3)
    damaged[1, 2] = damage
    with pytest.raises(CalibrationError, match="calibration batch 1 are not finite"):
        _importance(export(seeded(_LastToken()), rows(2, 3)), rows(2, 3), damaged)
