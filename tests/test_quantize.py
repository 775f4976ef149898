"""`quantize` on programs that hold what real ones hold: caches, nested graphs, keyword inputs, odd widths."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lopro_fx
from lopro_fx import GPTQ, RTN, CalibrationError, GraphError, LoPRo
from lopro_fx.layer import dense_weight
from tests.helpers import assert_close, generator
from tests.programs import WIDTH, Cached, Nested, Scaled, Twice, decoder, export, ids, rows, seeded

CONFIG = LoPRo(bits=4, group_size=32, rank=2, clip_steps=4)


def _odd() -> nn.Module:
    return seeded(
        nn.Sequential(nn.Linear(99, 40, bias=False), nn.ReLU(), nn.Linear(40, 99), nn.ReLU(), nn.Linear(99, 3))
    )


def _wide(*lead: int, seed: int = 0) -> Tensor:
    return torch.randn(*lead, 99, generator=generator(seed))


CASES: dict[str, tuple[nn.Module, list[tuple[tuple, dict]]]] = {
    "cache": (seeded(Cached()), [((rows(4, seed=i),), {}) for i in range(8)]),
    "no_grad": (seeded(Nested(None)), [((rows(4, seed=i),), {}) for i in range(8)]),
    "autocast off": (seeded(Nested(False)), [((rows(4, seed=i),), {}) for i in range(8)]),
    "autocast on": (seeded(Nested(True)), [((rows(4, seed=i),), {}) for i in range(8)]),
    "used twice": (seeded(Twice()), [((rows(4, seed=i),), {}) for i in range(8)]),
    "odd widths": (_odd(), [((_wide(16, seed=i),), {}) for i in range(8)]),
    "keyword inputs": (
        seeded(Scaled()),
        [
            (((rows(4, seed=i), rows(4, seed=i + 9)),), {"mask": rows(4, seed=i + 20), "bias": rows(1)})
            for i in range(8)
        ],
    ),
}


def _run(program: Any, batch: tuple[tuple, dict]) -> Tensor:
    with torch.no_grad():
        return program.module()(*batch[0], **batch[1])


@pytest.mark.parametrize("transform", ["identity", "act_order", "partial", "full"])
@pytest.mark.parametrize("name", CASES)
def test_packed_and_fake_quantised_programs_are_one(name: str, transform: str) -> None:
    original, batches = CASES[name]
    # A program writes the buffers of the module that it was exported from, so each has its own.
    module, twin = (copy.deepcopy(original) for _ in range(2))
    program = export(module, *batches[0][0], **batches[0][1])
    config = LoPRo(bits=4, group_size=32, rank=2, clip_steps=4, salient=16, transforms=transform)
    state = lopro_fx.calibrate(program, batches, config)
    assert all(site.metrics["transform"] == transform for site in state.layers.values())
    for site in state.layers.values():
        dense = dense_weight(state.inputs[site.input], site)
        assert_close(site.name, twin.get_submodule(site.name).weight, dense, 0.2)
        twin.get_submodule(site.name).weight = nn.Parameter(dense)
    with torch.no_grad():
        expected = twin(*batches[0][0], **batches[0][1])
    got = _run(lopro_fx.apply(program, state), batches[0])
    assert_close(name, expected, got, 2e-2 if name == "autocast on" else 1e-5)


def test_caches_are_delivered_clean() -> None:
    module, batches = CASES["cache"]
    result = lopro_fx.quantize(export(copy.deepcopy(module), rows(4)), batches, CONFIG)
    assert not result.constants["cache"].any()
    assert set(result.constants) == {"cache"}


@pytest.mark.parametrize("transform", ["act_order", "partial", "full"])
def test_what_follows_is_measured_on_what_will_be_stored(transform: str) -> None:
    """Feeding forward other weights than the packed ones would make the second layer's loss another one."""
    module, batches = CASES["odd widths"]
    config = LoPRo(
        bits=3, group_size=32, rank=1, clip_steps=4, salient=16, transforms=transform, token_clip=0, asymmetry=0
    )
    program = export(module, _wide(16))
    state = lopro_fx.calibrate(program, batches, config)
    last = state.layers["4"]
    twin = copy.deepcopy(module)
    for site in (state.layers["0"], state.layers["2"]):
        twin.get_submodule(site.name).weight = nn.Parameter(dense_weight(state.inputs[site.input], site))
    with torch.no_grad():
        x = torch.cat([twin[:4](batch[0][0]).flatten(0, -2) for batch in batches]).double()
    error = dense_weight(state.inputs["4"], last).double() - module[4].weight.double()
    weight, gram = module[4].weight.double(), x.T @ x
    # What is assumed of directions that few tokens show (methods/prior.py) counts in the reported loss.
    gram.diagonal().add_((x.shape[1] / x.shape[0]) ** 2 * gram.diagonal().mean())
    relative = (error @ gram * error).sum() / (weight @ gram * weight).sum()
    assert last.metrics["relative_loss"] == pytest.approx(relative.item(), rel=2e-3)


def test_a_state_fits_another_export_of_the_model() -> None:
    module, program = decoder(bias=True)
    state = lopro_fx.calibrate(program, [ids()], CONFIG)
    fixed = export(module, ids(1, 5))
    assert_close("logits", _run(lopro_fx.apply(program, state), ((ids(1, 5),), {})),
                 _run(lopro_fx.apply(fixed, state), ((ids(1, 5),), {})), 1e-6)  # fmt: skip


def test_progress_grows_to_the_number_of_weights() -> None:
    calls: list[tuple[int, int, str]] = []
    state = lopro_fx.calibrate(decoder()[1], [ids()], RTN(bits=4), progress=lambda *call: calls.append(call))
    done, totals, labels = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert done[0] == 0
    assert done[-1] == state.weights
    assert set(totals) == {state.weights}
    assert list(labels[1:]) == list(state.inputs)


def test_the_run_is_on_record() -> None:
    state = lopro_fx.calibrate(decoder()[1], [ids(2, 9), ids(3, 5)], CONFIG)
    assert state.info["calibration_tokens"] == 33
    assert state.config == CONFIG.to_dict()
    ((name, reason),) = state.skipped
    assert name == "lm_head"
    assert "tied" in reason
    for site in state.layers.values():
        assert {"bits", "group_size", "rank", "transform", "bits_per_weight", "relative_loss", "damp"} <= set(
            site.metrics
        )


def test_a_singular_gram_warns_and_is_on_record() -> None:
    # Of many tokens in eight dimensions: what few tokens leave open is assumed, so no Gram of theirs is singular.
    tokens = torch.randn(1 << 17, 8, generator=generator()) @ torch.randn(8, WIDTH, generator=generator(1))
    program = export(seeded(nn.Sequential(nn.Linear(WIDTH, 4))), tokens)
    with pytest.warns(UserWarning, match=r"'0'.*damping.*singular"):
        result = lopro_fx.quantize(program, [tokens], GPTQ(bits=4, group_size=32, damp=0))
    (row,) = lopro_fx.report(result).rows
    assert row["damp"] > 0
    assert "damping" in row["warning"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_weight_is_named(value: float) -> None:
    program = export(seeded(Twice()), rows(4))
    program.state_dict["other.weight"].data[0, 0] = value
    with pytest.raises(GraphError, match=r"'other'.*NaN"):
        lopro_fx.quantize(program, None, RTN(bits=4))


def test_a_quantised_program_has_nothing_left_to_quantise() -> None:
    result = lopro_fx.quantize(decoder()[1], None, RTN(bits=4))
    with pytest.raises(GraphError, match="quantised already"):
        lopro_fx.quantize(result, None, RTN(bits=4))


def test_patterns_that_match_nothing_are_an_error() -> None:
    with pytest.raises(GraphError, match=r"blocks\.0\.q\b.*include"):
        lopro_fx.quantize(decoder()[1], None, RTN(bits=4, include="model.*"))


def test_a_batch_that_does_not_fit_is_reported_before_any_work() -> None:
    calls: list[tuple[int, int, str]] = []
    with pytest.raises(CalibrationError, match=r"batch 1\b"):
        lopro_fx.quantize(decoder()[1], [ids(), ids().float()], CONFIG, progress=lambda *call: calls.append(call))
    assert not calls


@pytest.mark.parametrize("batches", [None, [ids()]], ids=["data-free", "calibrated"])
@pytest.mark.filterwarnings("ignore:.*")
def test_what_is_excluded_does_not_change_the_others_seeds(batches: list[Tensor] | None) -> None:
    """Signs are the only random choice that shows as it is; without data nothing else of a layer depends on others."""
    _, program = decoder()
    whole = lopro_fx.calibrate(program, batches, CONFIG)
    part = lopro_fx.calibrate(program, batches, replace(CONFIG, exclude="blocks.0.*"))
    assert part.inputs.keys() == {name for name in whole.inputs if name.startswith("blocks.1.")}
    for name, group in part.inputs.items():
        assert torch.equal(group.tensors["signs"], whole.inputs[name].tensors["signs"])
    if batches is None:
        for name, site in part.layers.items():
            assert all(torch.equal(site.tensors[key], tensor) for key, tensor in whole.layers[name].tensors.items())
    other = lopro_fx.calibrate(program, batches, replace(CONFIG, seed=1))
    pairs = [(group.tensors["signs"], other.inputs[name].tensors["signs"]) for name, group in whole.inputs.items()]
    assert not any(torch.equal(one, another) for one, another in pairs)
    assert len({tuple(group.tensors["signs"].tolist()) for group in whole.inputs.values()}) == len(whole.inputs)
