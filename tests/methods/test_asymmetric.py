"""The asymmetric target: weights that make up for the drift of quantised inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lopro_fx
from lopro_fx import FLRQ, GPTQ, RTN, LoPRo
from lopro_fx.errors import ConfigError
from lopro_fx.layer import dense_weight
from lopro_fx.methods.asymmetric import compensated
from lopro_fx.methods.observers import Drift, Gram, Statistics
from tests.helpers import generator, heavy_tailed
from tests.programs import decoder, export, ids


def _statistics(clean: Tensor, x: Tensor) -> Statistics:
    gram, drift = Gram(), Drift()
    for before, rows in zip(clean.split(100), x.split(100), strict=True):
        gram.update(rows, None)
        drift.update_pair(rows, before, None)
    return Statistics({"gram": gram.result(), "drift": drift.result()}, len(x), len(x))


@given(st.floats(0.01, 1), st.floats(0.01, 2), st.integers(0, 99))
def test_outputs_come_closer_to_those_of_the_unquantised_model(part: float, size: float, seed: int) -> None:
    clean, rng = heavy_tailed(400, 24, seed), generator(seed)
    x = clean + size * torch.randn(400, 24, generator=rng) + size * clean[:, :1]
    weight = torch.randn(7, 24, generator=rng)
    found = compensated(weight, _statistics(clean, x), part)
    before, after = ((clean @ weight.T - x @ w.T).square().sum() for w in (weight, found))
    assert after < before


def test_all_of_it_is_least_squares_with_damping() -> None:
    clean, rng = heavy_tailed(4000, 16), generator()
    x = 0.7 * clean + torch.randn(4000, 16, generator=rng)
    weight = torch.randn(5, 16, generator=rng)
    gram = (x.T @ x / len(x)).double()
    ridge = (0.2 + (16 / 4000) ** 2) * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    wanted = (weight.double() @ (clean.T @ x / len(x) + ridge).T.double().T) @ torch.linalg.inv(gram + ridge)
    torch.testing.assert_close(compensated(weight, _statistics(clean, x), 1.0).double(), wanted, rtol=1e-4, atol=1e-4)


def test_without_drift_or_data_nothing_changes() -> None:
    x, weight = heavy_tailed(200, 16), torch.randn(5, 16, generator=generator())
    assert compensated(weight, _statistics(x, x), 1.0) is weight
    empty = Statistics({"gram": torch.eye(16), "drift": Drift().data_free(16, "cpu")}, 0)
    assert compensated(weight, empty, 1.0) is weight


def test_only_layers_behind_quantised_ones_change() -> None:
    module, _ = decoder()
    program, batches = export(module, ids(), dynamic=True), [ids()]

    def weights(**settings: object) -> dict[str, Tensor]:
        config = LoPRo(bits=2, group_size=32, rank=0, **settings)  # pyright: ignore[reportArgumentType]
        state = lopro_fx.calibrate(program, batches, config)
        return {name: dense_weight(state.inputs[layer.input], layer) for name, layer in state.layers.items()}

    plain, asymmetric = weights(asymmetry=0), weights(asymmetry=0.5)
    same = [torch.equal(plain[name], asymmetric[name]) for name in plain]
    assert same[0]
    assert not all(same)
    with pytest.raises(ConfigError, match="inputs of the unquantised model do not drift"):
        weights(sequential=False, asymmetry=0.5)


def test_one_layer_can_have_it() -> None:
    module, _ = decoder()
    program = export(module, ids(), dynamic=True)
    plain = LoPRo(rank=0, bits=2, asymmetry=0)
    names = list(lopro_fx.calibrate(program, [ids()], plain).layers)
    config = replace(plain, overrides={names[-1]: {"asymmetry": 0.5}})
    states = [lopro_fx.calibrate(program, [ids()], each) for each in (plain, config)]
    before, after = ({name: layer.tensors for name, layer in state.layers.items()} for state in states)
    changed = [
        name for name in names if any(not torch.equal(before[name][key], after[name][key]) for key in before[name])
    ]
    assert changed == [names[-1]]


def test_by_default_the_methods_with_their_own_recipe_have_it() -> None:
    assert LoPRo().asymmetry == FLRQ().asymmetry == 0.4
    assert LoPRo(sequential=False).asymmetry == FLRQ(sequential=False).asymmetry == 0
    assert LoPRo.paper().asymmetry == FLRQ.paper().asymmetry == GPTQ().asymmetry == RTN().asymmetry == 0


@pytest.mark.parametrize("value", [-0.1, 1.5, "half", True])
def test_values_out_of_range_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="asymmetry"):
        LoPRo(asymmetry=value)  # pyright: ignore[reportArgumentType]
