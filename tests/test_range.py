"""Weights far from 1: quantised to the relative error that they have near it, in every form of the result."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lopro_fx
from lopro_fx import FLRQ, GPTQ, RTN, GraphError, LoPRo, Method
from lopro_fx.layer import dense_weight
from lopro_fx.state import QuantState, state_of
from tests.helpers import generator, relative_rms
from tests.passes.quantised import CPU_SITE, run
from tests.programs import WIDTH, Decoder, export, ids, rows, seeded

METHODS: dict[str, Method] = {
    "rtn": RTN(bits=4, group_size=32),
    "gptq": GPTQ(bits=3, group_size=32, clip_steps=4),
    "lopro": LoPRo(bits=3, group_size=32, rank=4, clip_steps=4),
    "fp16 factors": LoPRo(bits=2, group_size=32, rank=4, factor_bits=16, clip_steps=4),
    "paper": LoPRo.paper(bits=4, rank=4, salient=32, clip_steps=4),
    "flrq": FLRQ(bits=3, group_size=32, rank_budget=2.0, least_gain=0, clip_steps=4),
    "flrq paper": FLRQ.paper(bits=4, rank_budget=2.0, least_gain=0, clip_steps=4),
    "8 bits": RTN(bits=8, group_size=-1),
}


class _Pair(nn.Module):
    """Two Linears that read one tensor, so that they share factors and may be merged."""

    def __init__(self, unit: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(WIDTH, 64, bias=False) for _ in range(2))
        seeded(self, 3)
        with torch.no_grad():
            self.first.weight.mul_(unit)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def _state(unit: float, config: Method, both: bool = False) -> tuple[nn.Module, QuantState]:
    module = _Pair(unit)
    if both:
        with torch.no_grad():
            module.second.weight.mul_(unit)
    return module, lopro_fx.calibrate(export(module, rows(200)), [rows(200)], config)


def _errors(module: nn.Module, state: QuantState) -> dict[str, float]:
    dense = {name: dense_weight(state.inputs[site.input], site) for name, site in state.layers.items()}
    return {name: relative_rms(module.get_submodule(name).weight, weight) for name, weight in dense.items()}


@pytest.mark.parametrize("exponent", [-100, -24, -10, 60, 100])
@pytest.mark.parametrize("method", METHODS)
def test_a_unit_changes_no_bit_of_a_matrix(method: str, exponent: int) -> None:
    config, unit = METHODS[method], 2.0**exponent
    plain_module, plain = _state(1.0, config, both=True)
    module, state = _state(unit, config, both=True)
    want = _errors(plain_module, plain)
    for name, error in _errors(module, state).items():
        assert error == pytest.approx(want[name], rel=2e-3)
        codes = [made.layers[name].tensors["codes"] for made in (state, plain)]
        assert torch.equal(*codes)


@pytest.mark.parametrize("unit", [1e-7, 1e-30, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_beside_an_ordinary_one_keeps_its_error(method: str, unit: float) -> None:
    config = METHODS[method]
    want = _errors(*_state(1.0, config))
    for name, error in _errors(*_state(unit, config)).items():
        # The branch serves the larger matrix, which is right; what is left of the other is its rounding alone.
        assert error < (1.1 if method in ("rtn", "gptq", "8 bits") else 1.6) * want[name]


@pytest.mark.parametrize("method", METHODS)
def test_tiny_rows_beside_ordinary_ones_keep_their_error(method: str) -> None:
    module = _Pair()
    with torch.no_grad():
        module.first.weight[::5] *= 1e-9
        module.first.weight[3] = 0
    state = lopro_fx.calibrate(export(module, rows(200)), [rows(200)], METHODS[method])
    site = state.layers["first"]
    assert site.tensors["scales"].dtype == torch.float32
    dense, weight = dense_weight(state.inputs[site.input], site), module.first.weight.detach()
    error = (dense - weight).double().norm(dim=1) / weight.double().norm(dim=1)
    if "perm" not in state.inputs[site.input].tensors and not method.startswith(("lopro", "fp16", "paper")):
        assert torch.equal(dense[3], torch.zeros(WIDTH))
    tiny, other = error[::5], error[1::5]
    assert tiny.max() < 2.5 * other[other.isfinite()].max()


@pytest.mark.parametrize("method", METHODS)
def test_ordinary_weights_cost_what_they_did(method: str) -> None:
    _, state = _state(1.0, METHODS[method])
    for site in state.layers.values():
        assert site.tensors["scales"].dtype == torch.float16
        assert site.tensors.get("up_scale", torch.zeros(0).half()).dtype == torch.float16


@pytest.mark.parametrize("method", ["lopro", "fp16 factors", "8 bits"])
@pytest.mark.parametrize("unit", [1e-30, 1e-7, 1e30])
def test_every_form_computes_with_the_wide_scales(method: str, unit: float, tmp_path: Path) -> None:
    module, state = _state(unit, METHODS[method])
    program = lopro_fx.apply(export(module, rows(200)), state)
    x = rows(5, seed=1)
    dense = [dense_weight(state.inputs[site.input], site) for site in state.layers.values()]
    want = [x @ weight.T for weight in dense]

    def check(got: tuple[Tensor, ...], ratio: float) -> None:
        for one, other in zip(want, got, strict=True):
            assert relative_rms(one, other) < ratio

    program = lopro_fx.apply(export(module, x), state)
    check(run(program, x), 1e-5)
    check(run(lopro_fx.optimize(program), x), 1e-5)
    native = lopro_fx.optimize(program, target="cpu", activations="float")
    assert native.graph.find_nodes(op="call_function", target=CPU_SITE)
    check(run(native, x), 1e-5)
    check(run(lopro_fx.optimize(program, target="cpu", activations="int8"), x), 0.02)
    lopro_fx.save(program, tmp_path / "program")
    loaded = lopro_fx.load(tmp_path / "program")
    check(run(loaded, x), 1e-5)
    again = lopro_fx.apply(export(module, x), state_of(loaded))
    check(run(again, x), 1e-5)
    assert lopro_fx.report(program).packed_bytes == state.packed_bytes


def test_heads_with_tiny_rows_keep_them() -> None:
    module = seeded(Decoder(depth=1))
    with torch.no_grad():
        module.embed.weight[:4] *= 1e-20
    config = RTN(bits=4, group_size=32, head_bits=8)
    state = lopro_fx.calibrate(export(module, ids()), [ids()], config)
    site = state.layers["lm_head"]
    dense, weight = dense_weight(state.inputs["lm_head"], site), module.embed.weight.detach()
    error = (dense - weight).double().norm(dim=1) / weight.double().norm(dim=1)
    assert error.max() < 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_before_anything_runs(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _Pair()
    with torch.no_grad():
        module.second.weight[3, 4] = value

    def ran(*_: object) -> None:
        raise AssertionError("calibration ran")

    monkeypatch.setattr(sys.modules["lopro_fx.quantize"], "Replay", ran)
    with pytest.raises(GraphError, match="'second' holds NaN, infinity"):
        lopro_fx.calibrate(export(module, rows(8)), [rows(8)], METHODS["rtn"])


@pytest.mark.parametrize("unit", [1e-40, 1e-25, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("method", ["gptq", "lopro"])
def test_activations_of_any_size_calibrate_alike(method: str, unit: float) -> None:
    module, x = _Pair(), torch.randn(300, WIDTH, generator=generator(5))
    config = METHODS[method]
    want = lopro_fx.calibrate(export(module, x), [x], config)
    got = lopro_fx.calibrate(export(module, x), [x * unit], config)
    for name in want.layers:
        pair = [state.layers[name].metrics["relative_loss"] for state in (want, got)]
        assert pair[1] == pytest.approx(pair[0], rel=0.15)
