"""LoPRo's own promises: the guard over candidates, the scale of its columns, and what rank and refits buy."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopro_fx import GPTQ, LoPRo
from lopro_fx.methods import prior
from lopro_fx.methods.ldlq import proxy_loss
from lopro_fx.methods.lopro import initial_factors, transform_for
from lopro_fx.methods.lowrank import column_scale
from lopro_fx.methods.prior import shrinkage
from tests.helpers import assert_close, generator, heavy_tailed
from tests.methods.problems import approximation, check, ordinary, run, same, statistics

CONFIG = LoPRo(
    bits=3, group_size=32, clip_steps=4, rank=4, salient=32, transforms=("identity", "act_order", "partial", "full")
)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [0, 4])
def test_the_result_is_at_least_as_good_as_every_candidate(rank: int, seed: int) -> None:
    config = replace(CONFIG, rank=rank)
    solution = run(ordinary(seed=seed), config, seed)
    assert set(solution.losses) == set(config.transforms)
    assert solution.choice == min(solution.losses, key=lambda name: solution.losses[name])
    assert solution.loss <= min(solution.losses.values())


@pytest.mark.parametrize("seed", range(4))
def test_without_a_branch_it_is_never_worse_than_gptq_in_act_order(seed: int) -> None:
    problem = ordinary(seed=seed)
    shared = {
        "bits": CONFIG.bits,
        "group_size": CONFIG.group_size,
        "clip_steps": CONFIG.clip_steps,
        "damp": CONFIG.damp,
    }
    gptq = run(problem, GPTQ(act_order="column", **shared))
    assert run(problem, replace(CONFIG, rank=0)).loss <= gptq.loss * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_refits_and_rank_never_cost(seed: int) -> None:
    problem = ordinary(seed=seed)
    refitted = [run(problem, replace(CONFIG, refits=refits, transforms=("full",))).loss for refits in (1, 2, 4)]
    assert refitted == sorted(refitted, reverse=True)
    ranked = [run(problem, replace(CONFIG, rank=rank)).loss for rank in (0, 4, 12)]
    assert ranked == sorted(ranked, reverse=True)


def test_the_seed_decides_the_signs() -> None:
    config = replace(CONFIG, transforms=("full",))
    assert not same(run(ordinary(), config, 0), run(ordinary(), config, 1))


def test_both_sketches_solve_alike() -> None:
    solutions = {}
    for low_rank in ("block_svd", "r1_sketch"):
        config = replace(CONFIG, low_rank=low_rank, rank=12, transforms=("full",), refits=0, power_iterations=8)
        solutions[low_rank] = run(ordinary(), config)
        check(solutions[low_rank], ordinary())
    assert not same(*solutions.values())
    # The block SVD is the best in the Gram's norm, which the sketch takes column by column.
    assert 1 <= solutions["r1_sketch"].loss / solutions["block_svd"].loss < 1.6


@given(st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=50))
def test_largest_and_smallest_scale_are_inverse(magnitude: list[float]) -> None:
    scale = column_scale(torch.tensor(magnitude), 2.4)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert scale.max() * scale.min() == pytest.approx(1, rel=1e-5)


@given(st.lists(st.floats(2**-7, 128, width=32), min_size=2, max_size=50), st.sampled_from((0.25, 8.0)))
def test_the_scale_ignores_units_and_keeps_the_order(magnitude: list[float], unit: float) -> None:
    values = torch.tensor(magnitude)
    assert_close("scale", column_scale(values, 2.4), column_scale(values * unit, 2.4), 1e-5)
    assert torch.equal(
        column_scale(values, 2.4)[values.argsort()].diff() >= 0, torch.ones(len(values) - 1, dtype=torch.bool)
    )


@pytest.mark.parametrize("low_rank", ["block_svd", "r1_sketch"])
def test_equal_magnitudes_give_the_plain_truncated_svd(low_rank: str) -> None:
    config = replace(CONFIG, low_rank=low_rank, factor_bits=16, power_iterations=16)
    joint = torch.randn(40, 64, generator=generator())
    joint[:, :6] *= 20
    stats = statistics(torch.eye(64))
    stats = replace(stats, values={**stats.values, "magnitude": torch.full((64,), 0.7)})
    left, right = initial_factors(joint, stats, config, generator())
    tail = torch.linalg.svdvals(joint)[config.rank :].square().sum()
    assert tail * (1 - 1e-4) <= (joint - left @ right).square().sum() <= 1.02 * tail


@pytest.mark.parametrize("width", [1, 96, 99, 160, 576])
@pytest.mark.parametrize("name", ["identity", "act_order", "partial", "full"])
def test_candidates_are_orthogonal_at_any_width(name: str, width: int) -> None:
    gram = torch.diag(torch.rand(width, generator=generator()) + 0.1)
    transform = transform_for(name, torch.randn(4, width, generator=generator()), gram, CONFIG, generator())
    matrix = transform.forward(torch.eye(width, dtype=torch.float64))
    assert (matrix @ matrix.T - torch.eye(width)).abs().max() < 1e-12
    if name == "partial" and transform.block > 1:
        assert transform.skip == min(CONFIG.salient, width)


@pytest.mark.parametrize("low_rank", ["block_svd", "r1_sketch"])
def test_the_branch_goes_to_the_rows_that_matter(low_rank: str) -> None:
    """Rows only meet in the down factor: the heavy ones gain by it, and the rounding of each stays its own."""
    (first, second), x = ordinary((24, 24))
    stats = statistics(x)
    config = replace(CONFIG, transforms=("full",), rank=2, low_rank=low_rank)

    def losses(rows: torch.Tensor | None) -> list[float]:
        weighed = replace(stats, rows=rows)
        solution = config.solution([first, second], weighed, generator())
        error = torch.cat([first, second]) - approximation(solution)
        return [proxy_loss(part, stats.gram) for part in error.split(24)]

    even = losses(None)
    heavy = losses(torch.tensor([1.9] * 24 + [0.1] * 24))
    assert heavy[0] < even[0]
    assert heavy[1] > even[1]
    assert losses(torch.ones(48)) == pytest.approx(even, rel=1e-4)


def test_feedback_is_damped_by_features_over_tokens() -> None:
    weights, x = [torch.randn(8, 20, generator=generator())], heavy_tailed(400, 20, 0)
    assert shrinkage(statistics(x)) == pytest.approx(0.05, rel=0.02)
    assert shrinkage(statistics(x[:30])) == 0.1
    assert shrinkage(replace(statistics(x), tokens=0)) == 0
    config = LoPRo(bits=3, group_size=32, rank=0, sweeps=0, transforms="identity")
    with mock.patch.object(prior, "shrinkage", return_value=0.0):
        wanted = run((weights, x), replace(config, damp=1.01 * (1 + shrinkage(statistics(x))) - 1))
    found = run((weights, x), config)
    assert torch.equal(found.rounded.dense(), wanted.rounded.dense())
    # It is no sign of a Gram close to singular.
    assert found.damp == config.damp
