"""Every method on ordinary and extreme groups: finite, consistent with its own figures, and repeatable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lopro_fx import FLRQ, GPTQ, RTN, LoPRo
from lopro_fx.calibration.statistics import data_free
from lopro_fx.methods.rounding import Rounding
from tests.helpers import generator, relative_rms
from tests.methods.problems import EDGES, approximation, check, ordinary, run, same, statistics

ALL = ("identity", "act_order", "partial", "full")
METHODS: dict[str, Rounding] = {
    "rtn": RTN(bits=3, group_size=32, clip_steps=4),
    "gptq": GPTQ(bits=3, group_size=32, clip_steps=4, act_order="none"),
    "gptq by group": GPTQ(bits=4, group_size=64, clip_steps=4, act_order="group"),
    "gptq, static grids": GPTQ(bits=3, group_size=32, clip_steps=4, act_order="static"),
    "gptq by column": GPTQ(bits=2, group_size=-1, clip_steps=4, act_order="column"),
    "lopro": LoPRo(bits=3, group_size=32, clip_steps=4, rank=3, salient=32, transforms=ALL),
    "lopro, fp16 factors": LoPRo(bits=4, group_size=64, clip_steps=4, rank=2, factor_bits=16, transforms=("full",)),
    "lopro, rank above both sides": LoPRo(bits=3, group_size=32, clip_steps=4, rank=200, transforms=("act_order",)),
    "lopro, no branch": LoPRo(bits=3, group_size=-1, clip_steps=4, rank=0, transforms=ALL),
    "flrq": FLRQ(bits=3, group_size=32, clip_steps=4, rank_budget=1.0, least_gain=0),
    "flrq by range": FLRQ(bits=4, group_size=-1, clip_steps=4, rank_budget=1.0, statistic="range", least_gain=0),
    "flrq, sketches of the error": FLRQ(
        bits=2, group_size=32, clip_steps=4, low_rank="r1_sketch", factor_bits=16, rank_budget=1.0, least_gain=0
    ),
    "flrq of the paper": FLRQ.paper(bits=2, clip_steps=4, epochs=3, rank_budget=2.0, least_gain=0, slope_window=0),
    "flrq, trellis": FLRQ(bits=2, format="trellis", window=12, rank_budget=1.0, epochs=2),
    "rtn, trellis": RTN(bits=2.5, format="trellis", window=12),
    "gptq, trellis": GPTQ(bits=3, format="trellis", window=12),
    "gptq by column, trellis": GPTQ(bits=2, format="trellis", window=12, strip=32, act_order="column"),
    "lopro, trellis": LoPRo(bits=2, format="trellis", window=12, rank=3),
    "lopro of the paper": LoPRo.paper(bits=3, clip_steps=4, rank=3, salient=32),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("method", METHODS)
def test_edges_are_survived(method: str, edge: str) -> None:
    config, problem = METHODS[method], EDGES[edge]
    solution = run(problem, config)
    check(solution, problem)
    # Two bits and one token may leave much of it, but never more than leaving the layer out would.
    assert solution.relative < 1
    if edge == "no activation":
        joint = torch.cat(problem[0])
        assert relative_rms(joint, approximation(solution)) < 0.7


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes(method: str) -> None:
    problem = ordinary()
    assert same(run(problem, METHODS[method], 3), run(problem, METHODS[method], 3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("weight_unit", "input_unit"), [(2.0**-8, 1.0), (2.0**6, 1.0), (1.0, 2.0**-8), (1.0, 2.0**10)])
def test_units_of_weights_and_inputs_do_not_matter(method: str, weight_unit: float, input_unit: float) -> None:
    weights, x = ordinary()
    plain = run((weights, x), METHODS[method])
    scaled = run(([weight * weight_unit for weight in weights], x * input_unit), METHODS[method])
    assert scaled.relative == pytest.approx(plain.relative, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_data_free_is_solved_on_an_identity_gram(method: str) -> None:
    weights, _ = ordinary()
    solution = METHODS[method].solution(weights, data_free(128, METHODS[method].observers()), generator())
    # On an identity Gram the loss is the squared error of the weights.
    assert solution.relative == pytest.approx(relative_rms(torch.cat(weights), approximation(solution)) ** 2, rel=1e-3)
    assert solution.relative < 0.3


@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if config.format == "affine"])
def test_eight_bits_leave_almost_nothing(method: str) -> None:
    config = METHODS[method]
    fine = type(config)(**{**_fields(config), "bits": 8})
    assert run(ordinary(), fine).relative < 2e-3 * max(run(ordinary(), config).relative, 0.05)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lopro, rank above both sides"])
def test_more_bits_are_better(method: str) -> None:
    config = METHODS[method]
    widths = [bits for bits in type(config.quantizer).allowed["bits"] if isinstance(bits, int)]
    # A string of few rows is rounded by luck.
    problem = ordinary((96, 64))
    losses = [run(problem, type(config)(**{**_fields(config), "bits": bits})).relative for bits in widths]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("method", ["gptq", "lopro"])
def test_a_singular_gram_raises_the_damping_and_says_so(method: str) -> None:
    weights, x = ordinary()
    config = type(METHODS[method])(**{**_fields(METHODS[method]), "damp": 0})
    # So many tokens, all of three directions, that nothing is assumed of the others.
    stats = replace(statistics(x[:3]), tokens=10**9, distinct=10**9)
    solution = config.solution(weights, stats, generator())
    assert solution.damp > 0
    assert torch.isfinite(approximation(solution)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_solved_in_fp32(dtype: torch.dtype) -> None:
    weights, x = ordinary()
    narrow = [weight.to(dtype) for weight in weights]
    config = METHODS["lopro"]
    assert same(run((narrow, x), config), run(([weight.float() for weight in narrow], x), config))


def _fields(config: Rounding) -> dict:
    return {name: value for name, value in config.to_dict().items() if name != "method"}
