"""Low-rank factors against the Eckart-Young bound, and their rounding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lopro_fx.methods.lowrank import correction, fit_up, gram_components, r1_sketch, round_factor
from lopro_fx.methods.prior import FACTOR_DAMP
from tests.helpers import assert_close, damped, generator, gram_of, heavy_tailed


def _outliers(m: int = 48, n: int = 80, seed: int = 0) -> Tensor:
    """fp64 Gaussian matrix with six columns that are 20 times larger."""
    matrix = torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    matrix[:, torch.randperm(n, generator=generator(seed))[:6]] *= 20
    return matrix


def _tail(matrix: Tensor, rank: int) -> float:
    """Least squared error of any approximation of this rank."""
    return torch.linalg.svdvals(matrix.double())[rank:].square().sum().item()


def _error(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    return (matrix - left @ right).double().square().sum().item()


def _int8(vector: Tensor) -> Tensor:
    return round_factor(vector.unsqueeze(0), 8, 0).dense()[0].to(vector.dtype)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_every_component_takes_exactly_its_square_off(m: int, n: int, seed: int) -> None:
    matrix = _outliers(m, n + 6, seed)
    left, right = r1_sketch(matrix, min(m, 6), generator(seed), 3)
    whole = matrix.square().sum().item()
    previous = whole
    for i in range(left.shape[1]):
        sigma = left[:, i].norm() * right[i].norm()
        error = _error(matrix, left[:, : i + 1], right[: i + 1])
        assert error == pytest.approx(previous - sigma.item() ** 2, abs=1e-12 * whole)
        assert error <= previous + 1e-12 * whole
        assert error >= _tail(matrix, i + 1) - 1e-12 * whole
        previous = error


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [8, 16])
def test_eight_iterations_are_within_two_per_cent_of_the_best(rank: int, seed: int) -> None:
    matrix = _outliers(seed=seed)
    sketched = r1_sketch(matrix, rank, generator(seed), 8)
    assert _tail(matrix, rank) * (1 - 1e-12) <= _error(matrix, *sketched) <= 1.02 * _tail(matrix, rank)
    down = gram_components(matrix, None, rank, generator(seed), iterations=4)
    error = _error(matrix, matrix @ down.T, down)
    assert _tail(matrix, rank) * (1 - 1e-12) <= error <= 1.02 * _tail(matrix, rank)


def test_iterations_help() -> None:
    errors = []
    for iterations in (0, 1, 8):
        sketches = [(_outliers(seed=s), r1_sketch(_outliers(seed=s), 8, generator(s), iterations)) for s in range(4)]
        errors.append(sum(_error(matrix, *factors) for matrix, factors in sketches))
    assert errors[0] > errors[1] > errors[2]


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 99))
def test_low_rank_matrices_are_exact(rank: int, more: int, seed: int) -> None:
    rng = generator(seed)
    matrix = torch.randn(20, rank, generator=rng, dtype=torch.float64) @ torch.randn(rank, 30, generator=rng).double()
    left, right = r1_sketch(matrix, rank + more, generator(seed), 200)
    assert_close("R1-sketch", matrix, left @ right, 1e-10)
    down = gram_components(matrix, None, rank + more, generator(seed))
    assert_close("block SVD", matrix, matrix @ down.T @ down, 1e-10)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40), st.integers(0, 99))
def test_components_are_orthonormal_in_the_gram_norm(m: int, n: int, rank: int, seed: int) -> None:
    matrix = torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    gram = gram_of(heavy_tailed(4 * n, n, seed)).double()
    down = gram_components(matrix, gram, rank, generator(seed))
    kept = min(m, n, rank)
    assert down.shape == (kept, n)
    assert_close("A H Aᵀ", torch.eye(kept), down @ damped(gram, FACTOR_DAMP) @ down.T, 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_components_are_those_of_the_scaled_svd(seed: int) -> None:
    """The loss is that of SVD_r(M L) L⁻¹ with H = L Lᵀ."""
    matrix = torch.randn(40, 64, generator=generator(seed), dtype=torch.float64)
    gram = damped(gram_of(heavy_tailed(512, 64, seed)).double(), FACTOR_DAMP)
    root = torch.linalg.cholesky(gram)
    down = gram_components(matrix, gram_of(heavy_tailed(512, 64, seed)).double(), 6, generator(seed), iterations=20)
    best = torch.linalg.svd(matrix @ root).Vh[:6] @ torch.linalg.inv(root)
    own, wanted = (a.T @ torch.linalg.solve(a @ gram @ a.T, a) for a in (down, best))
    assert_close("projections", wanted, own, 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_rounded_components_never_raise_the_error(seed: int) -> None:
    matrix = _outliers(seed=seed)
    left, right = r1_sketch(matrix, 24, generator(seed), 4, _int8)
    errors = [_error(matrix, left[:, :i], right[:i]) for i in range(25)]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    assert errors[24] < 1.1 * _tail(matrix, 24)


def test_the_sketch_of_zero_is_zero() -> None:
    left, right = r1_sketch(torch.zeros(5, 7), 3, generator())
    assert not left.any()
    assert not right.any()


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from((0, 1)), st.integers(-5, 4), st.integers(0, 99))
def test_int8_factors_are_within_half_a_step(rank: int, n: int, dim: int, power: int, seed: int) -> None:
    values = torch.randn(rank, n, generator=generator(seed)) * 10.0**power
    factor = round_factor(values, 8, dim)
    assert factor.values.dtype == torch.int8
    assert factor.values.abs().max() <= 127
    assert factor.scale is not None
    assert factor.scale.shape == (values.shape[dim],)
    amax = values.abs().amax(1 - dim, keepdim=True)
    # Half a step, and what fp16 keeps of the scale: 11 bits, or 2**-24 where it is subnormal.
    bound = amax / 127 * 0.5 + amax * 2**-10 + 127 * 2.0**-24
    assert ((factor.dense() - values).abs() <= bound).all()


def test_fp16_factors_are_the_values_in_fp16() -> None:
    values = torch.randn(4, 9, generator=generator())
    factor = round_factor(values, 16, 0)
    assert factor.scale is None
    assert torch.equal(factor.dense(), values.half().float())
    assert torch.isfinite(round_factor(torch.tensor([[1e6, -1e6]]), 16, 0).dense()).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 1)])
def test_small_factors_round(shape: tuple[int, int]) -> None:
    assert round_factor(torch.zeros(shape), 8, 0).dense().shape == shape


@pytest.mark.parametrize("factor_bits", [8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_correction_is_near_the_optimum_of_the_gram_norm(factor_bits: int, seed: int) -> None:
    error = torch.randn(40, 64, generator=generator(seed))
    gram = gram_of(heavy_tailed(512, 64, seed))
    up, down = correction(error, gram, 6, factor_bits, generator(seed))
    left = (error - up @ down.dense()).double()
    loss = (left @ gram.double() * left).sum().item()
    best = _tail(error.double() @ torch.linalg.cholesky(gram.double()), 6)
    assert best * (1 - 1e-6) <= loss <= 1.05 * best


def test_the_up_factor_leaves_no_gradient() -> None:
    error, down = torch.randn(20, 32, generator=generator()), torch.randn(4, 32, generator=generator(1))
    gram = gram_of(torch.randn(200, 32, generator=generator(2)))
    up = fit_up(error, gram, down)
    # Some part of the mean diagonal counts besides: which is best is measured, that the slope of one of them is nought
    # isn't. The slope grows in proportion to the part, so two values of it tell where it is nought.
    flat = gram.diagonal().mean() * torch.eye(32)
    left, right = ((error - up @ down) @ norm @ down.T for norm in (gram, flat))
    part = -(left * right).sum() / right.square().sum()
    assert 0 <= part < 0.5
    assert (left + part * right).norm() < 1e-4 * (error @ gram @ down.T).norm()


def test_an_error_that_does_nothing_is_left_alone() -> None:
    up, down = correction(torch.zeros(5, 16), torch.eye(16), 3, 8, generator())
    assert not (up @ down.dense()).any()
