"""Groups of Linears to solve: ordinary ones, and shapes and values that a method must survive."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.calibration.statistics import measure
from lopro_fx.kernels.formats.affine.quantizer import AffineQuantizer
from lopro_fx.kernels.formats.affine.rounded import AffineRounded
from lopro_fx.kernels.formats.registry import dequantize
from lopro_fx.kernels.formats.scales import stored_scales
from lopro_fx.methods.observers import Drift, Gram, Magnitude, Statistics
from lopro_fx.methods.prior import informed
from lopro_fx.methods.rounding import Rounding
from lopro_fx.methods.solution import GroupSolution
from tests.helpers import generator, heavy_tailed, relative_rms

Problem = tuple[list[Tensor], Tensor]


def affine(bits: int, group_size: int, clip_steps: int = 24) -> AffineQuantizer:
    return AffineQuantizer(bits=bits, group_size=group_size, clip_steps=clip_steps)


def ordinary(rows: tuple[int, ...] = (24, 8), width: int = 128, seed: int = 0, scale: float = 0.05) -> Problem:
    """(weights, activations (tokens, width))."""
    weights = [torch.randn(m, width, generator=generator(seed + i)) * scale for i, m in enumerate(rows)]
    return weights, heavy_tailed(3 * width, width, seed)


def _dead_columns() -> Problem:
    weights, x = ordinary()
    x[:, ::5] = 0
    return weights, x


def _low_rank_gram() -> Problem:
    weights, x = ordinary()
    return weights, x[:5]


def _constant_rows() -> Problem:
    weights, x = ordinary()
    return [torch.full_like(weight, 0.3) for weight in weights], x


def _one_large_token() -> Problem:
    weights, x = ordinary()
    x[0] *= 1e4
    return weights, x


EDGES: dict[str, Problem] = {
    "one row": ordinary((1,)),
    "one column": ordinary((6,), 1),
    "one weight": ordinary((1,), 1),
    "narrower than a group": ordinary((6, 3), 20),
    "odd width": ordinary((6, 3), 99),
    "short last group": ordinary((6,), 160),
    "dead columns": _dead_columns(),
    "no activation": (ordinary()[0], torch.zeros(10, 128)),
    "low-rank Gram": _low_rank_gram(),
    "one token": (ordinary()[0], ordinary()[1][:1]),
    "constant rows": _constant_rows(),
    "one large token": _one_large_token(),
    "zero weights": ([torch.zeros(6, 128), torch.zeros(2, 128)], ordinary()[1]),
    "tiny weights": ordinary(scale=1e-6),
    "huge weights": ordinary(scale=1e4),
    "tiny activations": (ordinary()[0], ordinary()[1] * 1e-6),
    "huge activations": (ordinary()[0], ordinary()[1] * 1e5),
}


def statistics(x: Tensor) -> Statistics:
    return measure([x], "layer", "node", [Gram(), Magnitude(), Drift()])


def run(problem: Problem, config: Rounding, seed: int = 0) -> GroupSolution:
    weights, x = problem
    return config.solution(weights, statistics(x), generator(seed))


def approximation(solution: GroupSolution) -> Tensor:
    """fp32 (rows, width) in original coordinates, from what the solution stores."""
    dense = solution.rounded.dense()
    if solution.down is not None:
        dense = dense + torch.cat([up.dense() for up in solution.ups]) @ solution.down.dense()
    return solution.transform.inverse(dense)


def check(solution: GroupSolution, problem: Problem) -> None:
    """What holds for every solution of every method."""
    weights, x = problem
    joint, gram = torch.cat(weights), informed(statistics(x)).gram
    width = joint.shape[1]
    rounded = solution.rounded
    if isinstance(rounded, AffineRounded):
        assert rounded.codes.shape == joint.shape
        assert rounded.codes.max().item() < 1 << rounded.bits
        assert rounded.zeros.max().item() < 1 << rounded.bits
        stored = stored_scales(rounded.scales, rounded.bits).float()
        assert ((stored - rounded.scales).abs().amax(1) * 2**rounded.bits <= rounded.scales.amax(1)).all()
        assert (rounded.scales >= 0).all()
    parts = rounded.split([weight.shape[0] for weight in weights])
    packed = torch.cat([dequantize(part.packed(), torch.float32) for part in parts])
    # Scales below fp16's normal range are rounded, see `stored_scales`.
    assert relative_rms(rounded.dense(), packed) < 2**-5
    if solution.transform.perm is not None:
        assert torch.equal(solution.transform.perm.long().sort().values, torch.arange(width))
    if solution.down is not None:
        assert [up.values.shape[0] for up in solution.ups] == [weight.shape[0] for weight in weights]
        assert {up.values.shape[1] for up in solution.ups} == {solution.down.values.shape[0]}
    assert torch.isfinite(approximation(solution)).all()
    error = (approximation(solution) - joint).double()
    loss = (error @ gram.double() * error).sum()
    whole = (joint.double() @ gram.double() * joint.double()).sum()
    # The loss is a small difference of large fp32 products, so it is exact to a part of the whole.
    assert abs(solution.loss - loss.item()) <= 1e-3 * loss.item() + 1e-5 * whole.item(), (solution.loss, loss.item())
    if whole > 0:
        assert abs(solution.relative - loss / whole) <= 1e-3 * loss / whole + 1e-5
    else:
        assert solution.relative == 0


def same(first: GroupSolution, second: GroupSolution) -> bool:
    """Whether every stored value is equal, bit for bit."""

    def stored(solution: GroupSolution) -> list[Tensor | None]:
        factors = [] if solution.down is None else [solution.down, *solution.ups]
        values = [part for factor in factors for part in (factor.values, factor.scale)]
        transform, packed = solution.transform, solution.rounded.packed()
        return [transform.perm, transform.signs, *packed.tensors.values(), *values]

    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    first_values, second_values = stored(first), stored(second)
    return len(first_values) == len(second_values) and all(map(equal, first_values, second_values))
