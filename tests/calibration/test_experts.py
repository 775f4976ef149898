"""Statistics of experts: of their own tokens, blended with the layer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lopro_fx.calibration.experts import measure_experts
from lopro_fx.calibration.replay import Replay
from lopro_fx.methods.observers import Drift, Gram, Magnitude
from lopro_fx.methods.rounding import Rounding
from lopro_fx.passes.linears import as_linears
from lopro_fx.passes.sites import find_sites
from tests.helpers import generator, gram_of, relative_rms
from tests.mixtures import EXPERTS, HIDDEN, MixtureDecoder
from tests.programs import VOCAB, WIDTH, export, ids, seeded


def _observers() -> list[Gram | Magnitude]:
    return [Gram(), Magnitude()]


def _case(tokens: int = 60, width: int = 8, slots: int = 2, experts: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    rng = generator()
    x = [torch.randn(tokens, width, generator=rng) for _ in range(2)]
    # No token goes to the last expert.
    return x, [torch.randint(experts - 1, (tokens * slots,), generator=rng) for _ in range(2)]


def test_each_expert_is_measured_on_its_own_tokens_and_a_few_of_the_layer() -> None:
    x, routes = _case()
    seen = measure_experts(x, routes, 2, 4, "unit", "node", _observers)
    rows = [torch.cat([batch[(own == expert).nonzero().squeeze(1) // 2]
                       for batch, own in zip(x, routes, strict=True)]) for expert in range(4)]  # fmt: skip
    layer = gram_of(torch.cat(rows))
    assert relative_rms(layer, seen.gram) < 1e-5
    assert (seen.tokens, sum(own.routed for own in seen.experts)) == (240, 240)
    for own, mine in zip(seen.experts, rows, strict=True):
        prior = 8 / 4
        want = (len(mine) * (gram_of(mine) if len(mine) else 0) + prior * layer) / (len(mine) + prior)
        assert own.routed == len(mine)
        assert relative_rms(want, own.gram) < 1e-5
    assert seen.experts[3].tokens > 0
    assert relative_rms(layer, seen.experts[3].gram) < 1e-5


def test_pairs_that_are_hidden_or_weighted() -> None:
    x, routes = _case()
    visible = [torch.arange(120) < 60, None]
    weights = [torch.rand(60, generator=generator(1)), torch.rand(120, generator=generator(2))]
    seen = measure_experts(x, routes, 2, 4, "unit", "node", _observers, 0, weights, visible)
    pairs = torch.cat([x[0].repeat_interleave(2, 0)[:60], x[1].repeat_interleave(2, 0)])
    want = gram_of(pairs * torch.cat(weights).sqrt().unsqueeze(1))
    assert relative_rms(want, seen.gram) < 1e-5
    assert seen.tokens == 180


def test_a_pair_whose_expert_differs_has_no_drift() -> None:
    x, routes = _case(slots=1)
    moved = [batch + 1 for batch in x]
    same = measure_experts(x, routes, 1, 4, "unit", "node", lambda: [Gram(), Drift()], clean=(moved, routes))
    assert relative_rms(torch.cat(x).mean(0).expand(8, 8), same.drift) < 1e-5
    others = [(own + 1) % 4 for own in routes]
    apart = measure_experts(x, routes, 1, 4, "unit", "node", lambda: [Gram(), Drift()], clean=(moved, others))
    assert not apart.drift.any()


@pytest.mark.parametrize("importance", [False, True])
def test_replay_measures_the_experts_of_a_program(importance: bool) -> None:
    from lopro_fx.calibration.importance import measure_importance
    from lopro_fx.methods.lopro import LoPRo

    program = as_linears(export(seeded(MixtureDecoder()), ids(2, 7), dynamic=True))
    groups = find_sites(program).groups
    batches = [(torch.randint(VOCAB, (2, 9), generator=generator(seed)),) for seed in range(3)]
    method: Rounding = LoPRo(bits=4, rank=0)
    weights = measure_importance(program, groups, batches, 0) if importance else None
    found = {}
    replay = Replay(program, groups, batches, method, weights, torch.device("cpu"))
    for unit, seen in replay.units():
        found[unit.name] = unit, seen
        replay.install(
            method.solve_experts(unit, seen, _context()) if unit.experts else method.solve(unit, seen, _context())
        )
    unit, seen = found["experts.gate_up_proj"]
    assert unit.weights[0].shape == (EXPERTS, 2 * HIDDEN, WIDTH)
    assert sum(own.routed for own in seen.experts) == 2 * 2 * 9 * 3
    unit, seen = found["experts.down_proj"]
    assert seen.gram.shape == (HIDDEN, HIDDEN)
    assert seen.rows is None if not importance else seen.experts[0].rows.shape == (WIDTH,)


def _context():
    from lopro_fx.methods.base import Context

    return Context(torch.device("cpu"), generator())
