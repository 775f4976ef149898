"""FLRQ's promises: what a rank costs and gains, what the three rules accept, and that alternation keeps the best."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import lopro_fx
from lopro_fx import FLRQ, GPTQ, RTN, LoPRo
from lopro_fx.calibration.statistics import data_free
from lopro_fx.layer import stored_bytes
from lopro_fx.methods.base import Unit
from lopro_fx.methods.flexible_rank import Stopping, flexible_rank, range_rms, sized, sized_by_loss
from lopro_fx.methods.ldlq import proxy_loss
from lopro_fx.methods.lowrank import block_components, column_scale, r1_components
from lopro_fx.methods.rounding import pack_solution
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.state import state_of
from tests.helpers import assert_close, generator, gram_of, heavy_tailed, relative_rms
from tests.methods.problems import Problem, affine, approximation, check, ordinary, run, same, statistics

seeds = st.integers(0, 99)
# Any rank that the budget allows pays.
EAGER: dict[str, Any] = {"group_size": 32, "clip_steps": 4, "rank_budget": 1.0, "least_gain": 0}
CONFIGS = {
    "loss": FLRQ(**EAGER),
    "range": FLRQ(**EAGER, statistic="range"),
    "amax": FLRQ(**EAGER, statistic="amax", low_rank="r1_sketch"),
    "paper": FLRQ.paper(**EAGER, epochs=3, slope_window=0),
    "trellis": FLRQ(bits=2, format="trellis", window=12, rank_budget=1.0, least_gain=0, epochs=2),
}


def _rank(solution: GroupSolution) -> int:
    return 0 if solution.down is None else solution.down.rank


def _decaying(m: int, n: int, seed: int, power: float = 1.0) -> Tensor:
    """fp64 matrix (m, n) with singular values i^-power."""
    rng, k = generator(seed), min(m, n)
    left, right = (torch.linalg.qr(torch.randn(side, k, generator=rng, dtype=torch.float64)).Q for side in (m, n))
    return left * torch.arange(1, k + 1).double().pow(-power) @ right.T


def _outliers(rank: int, rows: tuple[int, ...] = (96, 32), width: int = 128, seed: int = 0) -> Problem:
    """Weights that are small noise and `rank` components far above it; white activations."""
    weights = [torch.randn(m, width, generator=generator(seed + i)) * 1e-3 for i, m in enumerate(rows)]
    right = torch.randn(rank, width, generator=generator(seed + 50))
    weights = [w + torch.randn(len(w), rank, generator=generator(seed + 60 + len(w))) @ right for w in weights]
    return weights, torch.randn(4 * width, width, generator=generator(seed + 70))


def _layered(rows: tuple[int, ...] = (96, 32), seed: int = 0) -> Problem:
    """Ordinary weights and activations, and twelve components of falling size that stretch every range."""
    weights, x = ordinary(rows, seed=seed)
    size = 2.0 ** -(torch.arange(12) / 2).unsqueeze(1)
    right = torch.randn(12, 128, generator=generator(seed + 50)) * size
    return [w + torch.randn(len(w), 12, generator=generator(seed + 60 + len(w))) @ right for w in weights], x


def _walk(matrix: Tensor, stopping: Stopping, seed: int = 0) -> tuple[int, list[float]]:
    """The rank that is kept, and the sizes seen on the way."""
    sizes = [matrix.abs().amax().item()]

    def size(remainder: Tensor) -> float:
        sizes.append(remainder.abs().amax().item())
        return sizes[-1]

    components = sized(matrix, r1_components(matrix, generator(seed), 4), size)
    return len(flexible_rank(sizes[0], components, stopping)[0]), sizes


# The sketch.


@given(st.integers(1, 30), st.integers(1, 30), seeds)
def test_a_matrix_of_rank_one_is_exact(m: int, n: int, seed: int) -> None:
    rng = generator(seed)
    matrix = torch.outer(*(torch.randn(side, generator=rng, dtype=torch.float64) for side in (m, n)))
    u, v = next(r1_components(matrix, generator(seed), 2))
    assert_close("component", matrix, torch.outer(u, v), 1e-10)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 8), seeds)
def test_a_component_takes_its_square_off(m: int, n: int, iterations: int, seed: int) -> None:
    matrix = _decaying(m, n, seed)
    u, v = next(r1_components(matrix, generator(seed), iterations))
    whole, sigma = matrix.square().sum(), u.norm()
    assert v.norm().item() == pytest.approx(1, abs=1e-12)
    assert (matrix - torch.outer(u, v)).square().sum().item() == pytest.approx((whole - sigma**2).item(), abs=1e-10)
    assert sigma <= torch.linalg.matrix_norm(matrix, 2) * (1 + 1e-12)


@given(seeds)
def test_more_iterations_find_the_largest_singular_value(seed: int) -> None:
    matrix = _decaying(24, 40, seed)
    found = [next(r1_components(matrix, generator(seed), it))[0].norm().item() for it in (0, 1, 4, 40)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(1, rel=1e-9)


@given(seeds)
def test_deflation_stays_near_the_tail_of_the_spectrum(seed: int) -> None:
    matrix = _decaying(40, 64, seed, 0.5)
    tails = [torch.linalg.svdvals(matrix)[r:].square().sum().item() for r in range(11)]
    for iterations, most in ((2, 1.25), (4, 1.12)):
        remainder, errors = matrix.clone(), [tails[0]]
        for u, v in islice(r1_components(matrix, generator(seed), iterations), 10):
            errors.append(remainder.addr_(u, v, alpha=-1).square().sum().item())
        assert all(after <= before for before, after in pairwise(errors))
        assert all(tail * (1 - 1e-12) <= error <= most * tail for tail, error in zip(tails, errors, strict=True))


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 4), seeds)
def test_scaling_and_back_is_exact_at_full_rank(m: int, n: int, power: float, seed: int) -> None:
    matrix = torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    scale = column_scale(torch.rand(n, generator=generator(seed)) + 0.2, power).double()
    whole = sum(torch.outer(u, v / scale) for u, v in r1_components(matrix * scale, generator(seed), 30))
    assert_close("matrix", matrix, torch.as_tensor(whole), 1e-8)


@given(st.floats(0.01, 100), seeds)
def test_a_constant_in_the_scale_changes_nothing(constant: float, seed: int) -> None:
    matrix, factor = _decaying(12, 20, seed), torch.rand(20, generator=generator(seed)).double() + 0.2
    made = []
    for scale in (factor, factor * constant):
        pairs = islice(r1_components(matrix * scale, generator(seed), 4), 3)
        made.append(torch.stack([torch.outer(u, v / scale) for u, v in pairs]).sum(0))
    assert_close("low rank", made[0], made[1], 1e-9)


@given(st.integers(1, 30), st.integers(1, 30), seeds)
def test_blocks_give_every_component_in_turn(m: int, n: int, seed: int) -> None:
    """Inside a block the squares fall; all components together are the matrix."""
    matrix = torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    gram = gram_of(heavy_tailed(4 * n, n, seed)).double()
    pairs = list(block_components(matrix, gram, generator(seed)))
    assert len(pairs) == min(m, n)
    assert_close("matrix", matrix, torch.stack([torch.outer(u, v) for u, v in pairs]).sum(0), 1e-5)
    squares = [u.square().sum().item() for u, _ in pairs[:8]]
    assert all(after <= before * (1 + 1e-3) for before, after in pairwise(squares))


def test_nothing_has_no_component() -> None:
    assert not list(block_components(torch.zeros(6, 9), torch.eye(9), generator()))
    assert not list(r1_components(torch.zeros(6, 9), generator()))


# The rules.


@given(st.integers(2, 40), st.integers(2, 40), st.floats(1e-4, 0.5), st.floats(0, 2), st.floats(0, 2), seeds)
def test_accepted_ranks_pay_and_fit_the_budget(
    m: int, n: int, price: float, budget: float, least: float, seed: int
) -> None:
    rank, sizes = _walk(_decaying(m, n, seed), Stopping(price, budget, least))
    assert rank <= min(m, n)
    assert price * rank <= budget + 1e-9
    for taken in range(1, rank + 1):
        assert price * least * taken <= math.log2(sizes[0] / sizes[taken]) + 1e-9
    # One more would break a rule, or there is none.
    more = price * (rank + 1)
    if rank < min(m, n) and more <= budget:
        assert more * least > math.log2(sizes[0] / sizes[rank + 1])


@given(st.integers(0, 6), st.lists(st.floats(0, 1.5), min_size=2, max_size=6), seeds)
def test_more_budget_and_cheaper_components_never_lower_the_rank(power: int, values: list[float], seed: int) -> None:
    matrix = _decaying(24, 32, seed, power / 2)
    by_budget = [_walk(matrix, Stopping(0.02, budget), seed)[0] for budget in sorted(values)]
    assert by_budget == sorted(by_budget)
    by_price = [_walk(matrix, Stopping(price / 10 + 1e-4, 1.0), seed)[0] for price in sorted(values, reverse=True)]
    assert by_price == sorted(by_price)


@given(st.lists(st.floats(0.01, 0.3), min_size=1, max_size=30), st.integers(1, 8), st.none() | st.floats(0, 2))
def test_a_flat_window_is_taken_back_by_half(gains: list[float], window: int, slope: float | None) -> None:
    sizes = [1.0]
    for gain in gains:
        sizes.append(sizes[-1] * 2**-gain)
    stopping = Stopping(0.005, 100.0, 1.0, window, slope)
    needed = window * 0.005 if slope is None else slope
    fed = iter([(torch.zeros(1), torch.zeros(1), size) for size in sizes[1:]])
    rank = len(flexible_rank(1.0, fed, stopping)[0])
    ends = [r for r in range(window, len(sizes)) if math.log2(sizes[r - window] / sizes[r]) < needed - 1e-9]
    assume(all(abs(math.log2(sizes[r - window] / sizes[r]) - needed) > 1e-9 for r in range(window, len(sizes))))
    assert rank == (ends[0] - window // 2 if ends else len(gains))


def test_nothing_to_take_is_rank_zero() -> None:
    def refused() -> Any:
        raise AssertionError("a component was computed")
        yield

    for size, stopping in ((0.0, Stopping(0.1, 1.0)), (1.0, Stopping(0.1, 0.0)), (1.0, Stopping(0.1, 0.09))):
        assert flexible_rank(size, refused(), stopping) == ([], [])


@given(st.integers(1, 30), st.integers(1, 30), seeds)
def test_the_loss_after_each_component_is_that_of_the_remainder(m: int, n: int, seed: int) -> None:
    matrix = torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    gram = gram_of(heavy_tailed(4 * n, n, seed)).double()
    loss, remainder = proxy_loss(matrix, gram), matrix.clone()
    for u, v, size in islice(sized_by_loss(matrix, gram, loss, block_components(matrix, gram, generator(seed))), 5):
        remainder.addr_(u, v, alpha=-1)
        assert size**2 == pytest.approx(proxy_loss(remainder, gram), rel=1e-9, abs=1e-12 * loss)


@given(st.integers(1, 9), st.integers(1, 200), seeds)
def test_the_loss_is_that_of_the_outputs(m: int, n: int, seed: int) -> None:
    error, x = torch.randn(m, n, generator=generator(seed)).double(), heavy_tailed(50, n, seed).double()
    assert proxy_loss(error, gram_of(x)) == pytest.approx((error @ x.T).square().sum().item() / 50, rel=1e-10)


@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from((32, 64, -1, None)), seeds)
def test_ranges_are_those_of_the_quantiser(m: int, n: int, size: int | None, seed: int) -> None:
    matrix = torch.randn(m, n, generator=generator(seed)) + 0.3
    if size is None:
        assert range_rms(matrix, None) == pytest.approx(matrix.norm().item() / (m * n) ** 0.5, rel=1e-5)
        return
    steps = affine(8, size, clip_steps=0).nearest(matrix, (m,)).scales
    assert range_rms(matrix, size) == pytest.approx(255 * steps.square().mean().sqrt().item(), rel=2e-3)


# The method.


@pytest.mark.parametrize("name", CONFIGS)
def test_a_branch_is_a_solution_of_its_own_rank(name: str) -> None:
    solution = run(_layered(), CONFIGS[name])
    assert _rank(solution) > 0
    check(solution, _layered())
    assert solution.transform.is_identity


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("budget", [0.0, 0.3, 0.7])
def test_stored_factors_fit_the_budget(name: str, budget: float) -> None:
    weights, _ = problem = _layered()
    config = replace(CONFIGS[name], rank_budget=budget)
    solution = run(problem, config)
    solved = pack_solution(Unit("unit", ("first", "second"), weights), solution)
    tensors = [solved.input.tensors, *(layer.tensors for layer in solved.layers)]
    factors = [t for owner in tensors for key, t in owner.items() if key.startswith(("down", "up"))]
    most = budget * config.bits * sum(weight.numel() for weight in weights)
    price = (config.factor_bits * (128 + 128) + (48 if config.factor_bits == 8 else 0)) / 8
    assert stored_bytes(factors) == price * _rank(solution)
    assert 8 * stored_bytes(factors) <= most
    assert {layer.facts["rank"] for layer in solved.layers} == {_rank(solution)}
    if not budget:
        assert solution.down is None
        assert solution.ups == ()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_larger_budget_never_lowers_the_rank(name: str) -> None:
    config = replace(CONFIGS[name], epochs=1)
    ranks = [_rank(run(_layered(), replace(config, rank_budget=budget))) for budget in (0, 0.2, 0.5, 1, 2)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


@pytest.mark.parametrize("statistic", ["loss", "range"])
def test_dear_factors_never_raise_the_rank(statistic: str) -> None:
    ranks = [_rank(run(_outliers(5), FLRQ(rank_budget=8, statistic=statistic, factor_bits=bits))) for bits in (16, 8)]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_components_above_the_noise_are_counted(rank: int, seed: int) -> None:
    found = _rank(run(_outliers(rank, (192, 64), 256, seed), FLRQ(rank_budget=8, statistic="range", epochs=1)))
    assert rank <= found <= rank + 4


@pytest.mark.parametrize("seed", range(2))
def test_the_largest_magnitude_may_miss_components_of_one_size(seed: int) -> None:
    """It is one number of a matrix, where ranges are many: few of six components lower it by what they cost."""
    problem = _outliers(6, (192, 64), 256, seed)
    ranks = [_rank(run(problem, FLRQ(rank_budget=8, statistic=each))) for each in ("range", "amax")]
    assert ranks[0] >= ranks[1]


@pytest.mark.parametrize("statistic", ["loss", "range", "amax"])
def test_noise_is_not_worth_a_branch(statistic: str) -> None:
    weights, _ = ordinary((96, 32))
    x = torch.randn(512, 128, generator=generator(9))
    assert _rank(run((weights, x), FLRQ(rank_budget=8, statistic=statistic))) == 0
    assert _rank(run((weights, x), FLRQ.paper(rank_budget=8))) == 0


def test_no_weights_need_no_branch() -> None:
    for config in CONFIGS.values():
        solution = run(([torch.zeros(6, 128), torch.zeros(2, 128)], ordinary()[1]), config)
        assert _rank(solution) == 0
        assert not approximation(solution).any()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CONFIGS)
def test_more_epochs_never_cost(name: str, seed: int) -> None:
    problem = _layered(seed=seed)
    losses = [run(problem, replace(CONFIGS[name], epochs=epochs)).loss for epochs in (1, 2, 5)]
    assert losses == sorted(losses, reverse=True)


def test_one_epoch_of_the_paper_is_the_first_pair() -> None:
    """The sketches of the scaled weights, and what they leave rounded to nearest."""
    weights, x = _layered()
    config = replace(CONFIGS["paper"], epochs=1)
    solution = run((weights, x), config)
    assert solution.down is not None
    low = torch.cat([up.dense() for up in solution.ups]) @ solution.down.dense()
    scale = column_scale(statistics(x).magnitude, config.scale_power)
    pairs = islice(r1_components(torch.cat(weights) * scale, generator(), 2), _rank(solution))
    assert_close("branch", torch.stack([torch.outer(u, v / scale) for u, v in pairs]).sum(0), low, 5e-3)
    nearest = run(
        ([part - own for part, own in zip(weights, low.split([96, 32]), strict=True)], x), RTN(**_shared(config))
    )
    assert_close("rounded", nearest.rounded.dense(), solution.rounded.dense(), 2e-2)


@pytest.mark.parametrize("seed", range(3))
def test_without_a_branch_it_is_the_method_that_it_rounds_by(seed: int) -> None:
    problem = ordinary(seed=seed)
    own = FLRQ(group_size=32, rank_budget=0)
    lopro = LoPRo(group_size=32, rank=0, transforms=("identity",))
    assert same(run(problem, own), run(problem, lopro))
    paper = FLRQ.paper(group_size=32, rank_budget=0, epochs=4)
    assert same(run(problem, paper), run(problem, RTN(group_size=32, token_clip=0)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3])
def test_a_branch_lowers_the_loss(bits: int, seed: int) -> None:
    problem = _layered(seed=seed)
    for name in ("loss", "range"):
        config = replace(CONFIGS[name], bits=bits)
        assert run(problem, config).loss < run(problem, replace(config, rank_budget=0)).loss
    gptq = run(problem, GPTQ(**_shared(CONFIGS["loss"])))
    assert run(problem, replace(CONFIGS["loss"], rank_budget=0.5)).loss < gptq.loss


@pytest.mark.parametrize("seed", range(3))
def test_clipping_never_raises_the_error_of_rounding(seed: int) -> None:
    """The whole range is a candidate of the search, as are finer steps of it."""
    weights = torch.cat(ordinary((96, 32), seed=seed)[0])
    errors = [relative_rms(weights, affine(3, 32, steps).nearest(weights, ()).dense()) for steps in (0, 10, 40)]
    assert errors == sorted(errors, reverse=True)


@given(st.sampled_from((2, 3, 4)), seeds)
def test_rounding_to_nearest_is_within_half_a_step(bits: int, seed: int) -> None:
    weights = torch.randn(6, 96, generator=generator(seed))
    rounded = affine(bits, 32).nearest(weights, ())
    assert rounded.codes.max().item() < 1 << bits
    error = (weights - rounded.dense()).abs()
    inside = (rounded.codes > 0) & (rounded.codes < (1 << bits) - 1)
    assert (error <= rounded.scales.repeat_interleave(32, 1) * 0.5001)[inside].all()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_seed_decides_little(name: str) -> None:
    """The same one gives the same bytes; others give ranks and losses near it, but by the largest magnitude alone."""
    problem, config = _layered(), replace(CONFIGS[name], rank_budget=0.5)
    assert same(run(problem, config, 1), run(problem, config, 1))
    if config.statistic == "amax":
        return
    solutions = [run(problem, config, seed) for seed in range(4)]
    ranks, losses = [_rank(solution) for solution in solutions], [solution.loss for solution in solutions]
    assert max(ranks) - min(ranks) <= 3
    assert max(losses) < 1.1 * min(losses)


def test_rows_that_matter_get_the_branch() -> None:
    (first, second), x = _layered((24, 24))
    stats = statistics(x)

    def losses(rows: Tensor | None) -> list[float]:
        solution = CONFIGS["loss"].solution([first, second], replace(stats, rows=rows), generator())
        error = torch.cat([first, second]) - approximation(solution)
        return [proxy_loss(part, stats.gram) for part in error.split(24)]

    even, heavy = losses(None), losses(torch.tensor([1.9] * 24 + [0.1] * 24))
    assert heavy[0] < even[0]
    assert heavy[1] > even[1]


def test_fewer_bits_have_more_epochs_in_the_paper() -> None:
    assert [FLRQ.paper(bits=bits).epochs for bits in (2, 3, 4)] == [20, 1, 1]
    assert FLRQ.paper(bits=2, epochs=3).epochs == 3
    assert (FLRQ.paper().rank_budget, FLRQ.paper().group_size, FLRQ.paper().factor_bits) == (0.2, 128, 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_program_of_two_linears_is_quantised_saved_and_resumed(name: str, tmp_path: Any) -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(128, 96), torch.nn.Linear(128, 32, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x), self.second(x)

    (first, second), x = _layered()
    module = Pair()
    module.first.weight.data.copy_(first)
    module.second.weight.data.copy_(second)
    program = torch.export.export(module, (x,))
    solved, state = (lopro_fx.calibrate(program, [x], CONFIGS[name], resume=tmp_path / "journal") for _ in range(2))
    # Only what was read, and not solved again, has the same time.
    assert solved.layers["first"].metrics == state.layers["first"].metrics
    quantised = lopro_fx.apply(program, state)
    down = state.inputs["first"].down
    assert down is not None
    assert {row["rank"] for row in lopro_fx.report(quantised).rows} == {down.rank}
    lopro_fx.save(quantised, tmp_path / "program")
    loaded = lopro_fx.load(tmp_path / "program")
    assert state_of(loaded).config == CONFIGS[name].to_dict()
    with torch.no_grad():
        forms = [each.module()(x) for each in (quantised, loaded, lopro_fx.optimize(loaded))]
        for i, want in enumerate(module(x)):
            assert relative_rms(want, forms[0][i]) < 0.35
            for other in forms[1:]:
                assert_close("the same program", forms[0][i], other[i], 1e-5)


def test_data_free_it_still_chooses() -> None:
    weights, _ = _outliers(3, (192, 64), 256)
    config = FLRQ(statistic="range", rank_budget=2)
    solution = config.solution(weights, data_free(256, config.observers()), generator())
    assert 3 <= _rank(solution) <= 7
    assert solution.relative == pytest.approx(relative_rms(torch.cat(weights), approximation(solution)) ** 2, rel=1e-3)


def _shared(config: FLRQ) -> dict[str, Any]:
    return {"bits": config.bits, "group_size": config.group_size, "clip_steps": config.clip_steps}
