"""One budget for a model: the division among Linears, overrides of single Linears, and the sizes that come out."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx import FLRQ, GPTQ, RTN, Budget, LoPRo
from lopro_fx.budget import Option, divide, hull
from lopro_fx.calibration.batches import flatten_batches
from lopro_fx.calibration.sensitivity import (
    Sensitivity,
    Text,
    divergence_together,
    gaussian_error,
    sensitivities,
    text_of,
)
from lopro_fx.errors import ConfigError
from lopro_fx.layer import dense_weight
from lopro_fx.methods.base import Method
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.registry import from_dict
from lopro_fx.methods.rounding import Rounding
from lopro_fx.models import export_causal_lm
from lopro_fx.passes.linears import as_linears
from lopro_fx.selection import select
from tests.helpers import generator, gram_of, heavy_tailed
from tests.programs import tiny_llama

TRELLIS = LoPRo(format="trellis", window=12, strip=32, rank=0, importance="gradient", head_bits=8)
METHODS: dict[str, Rounding] = {
    "trellis": TRELLIS,
    "affine": LoPRo(rank=2, group_size=32),
    "gptq": GPTQ(act_order="column"),
    "rtn": RTN(),
}

options = st.lists(
    st.builds(Option, st.just({}), st.integers(1, 40), st.integers(0, 1000).map(float)), min_size=1, max_size=5
)


@functools.cache
def _program() -> ExportedProgram:
    return export_causal_lm(tiny_llama())


def _batches(count: int = 3) -> list[Tensor]:
    return [torch.randint(97, (4, 32), generator=generator(seed)) for seed in range(count)]


@given(options)
def test_no_option_lies_below_the_hull(every: list[Option]) -> None:
    found = hull(every)
    assert found[-1].loss == min(option.loss for option in every)
    assert found[0].bytes == min(option.bytes for option in every)
    assert all(low.bytes < high.bytes and low.loss > high.loss for low, high in pairwise(found))
    for option in every:
        for low, high in pairwise(found):
            part = (option.bytes - low.bytes) / (high.bytes - low.bytes)
            if 0 <= part <= 1:
                assert option.loss >= low.loss + part * (high.loss - low.loss) - 1e-9


@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 120))
def test_a_division_is_the_best_of_its_size(each: list[list[Option]], limit: int) -> None:
    least = sum(min(option.bytes for option in own) for own in each)
    if limit < least:
        with pytest.raises(ConfigError, match="the least possible is"):
            divide(each, limit)
        return
    chosen = divide(each, limit)
    spent, loss = sum(option.bytes for option in chosen), sum(option.loss for option in chosen)
    assert spent <= limit
    for other in product(*each):
        if sum(option.bytes for option in other) <= spent:
            assert loss <= sum(option.loss for option in other) + 1e-9


@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 120), st.integers(0, 40))
def test_more_bytes_never_give_a_higher_loss(each: list[list[Option]], limit: int, more: int) -> None:
    least = sum(min(option.bytes for option in own) for own in each)
    first, second = (divide(each, max(limit, least) + extra) for extra in (0, more))
    assert sum(option.loss for option in second) <= sum(option.loss for option in first)


@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 3000))
def test_a_divergence_is_reached_with_few_bytes(each: list[list[Option]], most: int) -> None:
    least = sum(min(option.loss for option in own) for own in each)
    if most < least:
        with pytest.raises(ConfigError, match="the least predicted is"):
            divide(each, None, most)
        return
    chosen = divide(each, None, most)
    spent = sum(option.bytes for option in chosen)
    assert sum(option.loss for option in chosen) <= most
    # One byte less could not be divided so.
    if spent > sum(min(option.bytes for option in own) for own in each):
        assert sum(option.loss for option in divide(each, spent - 1)) > most


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "one of them"),
        ({"bits_per_weight": 3, "max_bytes": 1000}, "one of them"),
        ({"bits_per_weight": -1}, r"bits_per_weight=-1\): must be a number above 0 and below 64"),
        ({"bits_per_weight": 1e308}, "below 64"),
        ({"max_bytes": True}, "max_bytes=True"),
        ({"bits_per_weight": float("nan")}, "nan"),
    ],
)
def test_budgets_without_sense_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**values)


@pytest.mark.parametrize("name", METHODS)
def test_the_size_is_the_planned_one_and_fits(name: str) -> None:
    method, budget = METHODS[name], Budget(bits_per_weight=4.2)
    plan = lopro_fx.plan(_program(), _batches(), method, budget=budget)
    state = lopro_fx.calibrate(_program(), _batches(), method, budget=budget)
    assert state.packed_bytes == plan.bytes
    assert state.bits_per_weight == pytest.approx(plan.bits_per_weight)
    assert state.bits_per_weight <= 4.2
    assert len({(layer.weight.format, json.dumps(dict(layer.weight.spec))) for layer in state.layers.values()}) > 1
    assert plan.uniform is not None
    assert plan.kl <= plan.uniform.loss
    if method.joint:
        for shared in state.inputs.values():
            assert len({json.dumps(dict(state.layers[reader].weight.spec)) for reader in shared.readers}) == 1
    shown = str(plan)
    assert "model.layers.0.self_attn.q_proj" in shown
    assert "for all" in shown


def test_a_stopped_run_follows_its_plan(tmp_path: Path) -> None:
    budget = Budget(max_bytes=40_000)

    class Stop(Exception):
        pass

    def stopping(done: int, total: int, label: str) -> None:
        if "layers.1" in label:
            raise Stop

    with pytest.raises(Stop):
        lopro_fx.calibrate(_program(), _batches(), TRELLIS, budget=budget, resume=tmp_path / "run", progress=stopping)
    resumed = lopro_fx.calibrate(_program(), _batches(), TRELLIS, budget=budget, resume=tmp_path / "run")
    whole = lopro_fx.calibrate(_program(), _batches(), TRELLIS, budget=budget)
    assert resumed.config == whole.config
    assert resumed.info["plan"] == whole.info["plan"]
    for name, layer in whole.layers.items():
        for key, tensor in layer.tensors.items():
            assert torch.equal(tensor, resumed.layers[name].tensors[key])
    with pytest.raises(lopro_fx.CheckpointError, match="another"):
        lopro_fx.calibrate(_program(), _batches(), TRELLIS, budget=Budget(max_bytes=41_000), resume=tmp_path / "run")


def test_a_planned_program_is_saved_and_loaded(tmp_path: Path) -> None:
    program = lopro_fx.quantize(_program(), _batches(), TRELLIS, budget=Budget(bits_per_weight=3.5))
    lopro_fx.save(program, tmp_path / "out")
    loaded = lopro_fx.load(tmp_path / "out")
    ids = _batches()[0]
    assert torch.equal(loaded.module()(ids), program.module()(ids))
    optimised = lopro_fx.optimize(program, target="cpu", activations="float")
    torch.testing.assert_close(optimised.module()(ids), program.module()(ids), rtol=1e-3, atol=1e-3)
    rows = lopro_fx.report(program).rows
    assert len({row["bits"] for row in rows}) > 1


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        (TRELLIS, Budget(bits_per_weight=0.5), "the least possible here is"),
        (LoPRo(overrides={"*": {"bits": 4}}), Budget(bits_per_weight=4), "without overrides"),
        (FLRQ(), Budget(bits_per_weight=4), "flrq chooses ranks while it solves"),
        (LoPRo(transforms=("identity", "full")), Budget(bits_per_weight=4), "keeps one of the transforms"),
        (LoPRo(rank=16), Budget(bits_per_weight=2.5), "with rank=16, which costs more than it saves"),
        (TRELLIS, 4.2, r"budget=4.2: give a Budget"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(method: Method, budget: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lopro_fx.calibrate(_program(), _batches(1), method, budget=budget)
    with pytest.raises(ConfigError, match=message):
        lopro_fx.plan(_program(), _batches(1), method, budget=budget)


def test_a_divergence_is_predicted_and_met() -> None:
    loose, tight = (
        lopro_fx.plan(_program(), _batches(), TRELLIS, budget=Budget(max_kl=value)) for value in (1e-3, 1e-4)
    )
    assert loose.kl <= 1e-3
    assert tight.kl <= 1e-4
    assert tight.bytes > loose.bytes
    with pytest.raises(ConfigError, match="the least predicted is"):
        lopro_fx.plan(_program(), _batches(), TRELLIS, budget=Budget(max_kl=1e-12))


def test_a_budget_needs_calibration() -> None:
    for run in (lopro_fx.calibrate, lopro_fx.plan):
        with pytest.raises(ConfigError, match="pass batches of real text"):
            run(_program(), None, TRELLIS, budget=Budget(bits_per_weight=4))


def test_a_refused_budget_leaves_its_folder_to_another(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the least predicted is"):
        lopro_fx.calibrate(_program(), _batches(), TRELLIS, budget=Budget(max_kl=1e-12), resume=tmp_path / "run")
    budget = Budget(bits_per_weight=4.5)
    assert lopro_fx.calibrate(_program(), _batches(), TRELLIS, budget=budget, resume=tmp_path / "run").layers


@pytest.mark.parametrize("text", ["[]", "5", '{"x": 5}', "[{}, {}]", "{"])
def test_a_damaged_plan_is_made_again(text: str, tmp_path: Path) -> None:
    budget, folder = Budget(bits_per_weight=4.5), tmp_path / "run"
    whole = lopro_fx.calibrate(_program(), _batches(), TRELLIS, budget=budget, resume=folder)
    (folder / "plan.json").write_text(text)
    assert lopro_fx.calibrate(_program(), _batches(), TRELLIS, budget=budget, resume=folder).config == whole.config


def test_only_an_output_projection() -> None:
    config = replace(TRELLIS, exclude=("model.layers*",))
    plan = lopro_fx.plan(_program(), _batches(1), config, budget=Budget(bits_per_weight=9))
    assert plan.choices == ()
    assert (
        plan.bytes == lopro_fx.calibrate(_program(), _batches(1), config, budget=Budget(bits_per_weight=9)).packed_bytes
    )


class _Small(torch.nn.Module):
    """Two Linears; `kind` says what becomes of their result."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.kind = torch.nn.Linear(64, 64), torch.nn.Linear(64, 96), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        if self.kind == "masked":
            y = y.masked_fill(torch.arange(96) < 5, -torch.inf)
        return {"scalar": y.square().mean(), "one": y[..., :1]}.get(self.kind, y)


@pytest.mark.parametrize("kind", ["scalar", "one"])
def test_a_program_without_logits_is_refused(kind: str) -> None:
    program = torch.export.export(_Small(kind).eval(), (torch.randn(8, 64),))
    with pytest.raises(lopro_fx.CalibrationError, match="needs a program that returns logits"):
        lopro_fx.calibrate(program, [torch.randn(8, 64)], RTN(), budget=Budget(bits_per_weight=4))


def test_words_that_are_ruled_out_do_not_count() -> None:
    program = torch.export.export(_Small("masked").eval(), (torch.randn(8, 64),))
    plan = lopro_fx.plan(program, [torch.randn(8, 64, generator=generator())], RTN(), budget=Budget(bits_per_weight=4))
    assert 0 < plan.kl < 1


def test_batches_without_tokens() -> None:
    program = torch.export.export(_Small("").eval(), (torch.randn(8, 64),))
    x, damaged = torch.randn(8, 64, generator=generator()), torch.full((8, 64), torch.nan)
    with pytest.raises(lopro_fx.CalibrationError, match="calibration batch 1 are not finite"):
        lopro_fx.plan(program, [x, damaged], RTN(), budget=Budget(bits_per_weight=4))

    class Masked(torch.nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return small(x) + 0 * attention_mask.unsqueeze(-1)

    small = _Small("").eval()
    masked = Masked()
    masked.small = small
    shown, hidden = torch.ones(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    x = torch.randn(2, 4, 64, generator=generator())
    program = torch.export.export(masked, (x, shown))
    budget = Budget(bits_per_weight=4)
    both = lopro_fx.plan(program, [(x, shown), (x, hidden)], RTN(), budget=budget)
    assert both.kl == lopro_fx.plan(program, [(x, shown)], RTN(), budget=budget).kl > 0
    with pytest.raises(lopro_fx.CalibrationError, match="no batch holds a token"):
        lopro_fx.plan(program, [(x, hidden)], RTN(), budget=budget)


def test_overrides_give_linears_settings_of_their_own() -> None:
    config = LoPRo(
        rank=0, overrides={"*.mlp.*": {"bits": 4}, "*.down_proj": {"format": "trellis", "bits": 2, "window": 12}}
    )
    state = lopro_fx.calibrate(_program(), _batches(1), config)
    kinds = {name: (layer.weight.format, layer.weight.spec["bits"]) for name, layer in state.layers.items()}
    for name, kind in kinds.items():
        wanted = ("trellis", 2.0) if "down_proj" in name else ("affine", 4) if "mlp" in name else ("affine", 3)
        assert kind == wanted, name
    assert from_dict(json.loads(json.dumps(state.config))) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*": {"bits": 5}}, r"overrides\['\*'\] = \{'bits': 5\}: LoPRo\(bits=5\)"),
        ({"*": {"seed": 5}}, "setting of the whole run"),
        ({"*": {"bit": 5}}, "no such setting"),
        ({"*": 4}, "must be settings by pattern"),
        ([("*", {"bits": 4})], "must be settings by pattern"),
    ],
)
def test_overrides_without_sense_are_refused(overrides: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoPRo(overrides=overrides)  # pyright: ignore[reportArgumentType]


def _dense(state: lopro_fx.QuantState, name: str) -> Tensor:
    return dense_weight(state.inputs[state.layers[name].input], state.layers[name])


@pytest.mark.parametrize(
    "config",
    [
        LoPRo(rank=0, group_size=32),
        LoPRo(rank=0, group_size=32, importance="gradient", transforms=("partial",), salient=16),
        TRELLIS,
        GPTQ(act_order="column"),
        RTN(),
    ],
)
def test_linears_that_read_one_tensor_may_differ_in_format(config: Rounding) -> None:
    name = "model.layers.0.self_attn.{}_proj".format
    config = replace(config, sequential=False, asymmetry=0.0)
    apart = replace(config, overrides={"*.v_proj": {"bits": 8, "format": "affine"}, "*.k_proj": {"bits": 2}})
    whole, mixed = (lopro_fx.calibrate(_program(), _batches(), each) for each in (config, apart))
    weights = dict(tiny_llama().named_parameters())
    error = {}
    for letter in "qkv":
        weight = weights[name(letter) + ".weight"]
        error[letter] = [
            ((_dense(state, name(letter)) - weight).norm() / weight.norm()).item() for state in (whole, mixed)
        ]
    assert error["v"][1] < 0.3 * error["v"][0]
    assert error["k"][1] > 1.3 * error["k"][0]
    for key, tensor in whole.inputs[name("q")].tensors.items():
        assert torch.equal(mixed.inputs[name("q")].tensors[key], tensor), key
    if config.format == "affine":
        torch.testing.assert_close(_dense(mixed, name("q")), _dense(whole, name("q")))
    program = lopro_fx.apply(_program(), mixed)
    ids = _batches()[0]
    optimised = lopro_fx.optimize(program, target="cpu", activations="float")
    torch.testing.assert_close(optimised.module()(ids), program.module()(ids), rtol=1e-3, atol=1e-3)


def test_linears_that_share_more_than_the_input_get_the_same() -> None:
    different = {"*.v_proj": {"bits": 8}}
    refused = (
        LoPRo(rank=2, overrides=different),
        LoPRo(rank=0, transforms=("identity", "full"), overrides=different),
        FLRQ(overrides=different),
        RTN(overrides={"*.v_proj": {"act_bits": 8}}),
    )
    for config in refused:
        with pytest.raises(ConfigError, match=r"q_proj' and '.*v_proj' read one tensor"):
            lopro_fx.calibrate(_program(), _batches(1), config)


def test_patterns_of_overrides_that_match_nothing() -> None:
    with pytest.warns(UserWarning, match=r"overrides='\*v_porj' matches no Linear"):
        lopro_fx.calibrate(_program(), _batches(1), RTN(overrides={"*v_porj": {"bits": 8}}))
    with pytest.warns(UserWarning, match="overrides='lm_head' matches no solved Linear"):
        lopro_fx.calibrate(_program(), _batches(1), RTN(head_bits=8, overrides={"lm_head": {"bits": 4}}))
    with pytest.warns(UserWarning, match=r"exclude='\*nothere' matches no Linear"):
        lopro_fx.plan(_program(), _batches(1), RTN(exclude=("*nothere",)), budget=Budget(bits_per_weight=4))


@settings(max_examples=5, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.integers(0, 9))
def test_the_gaussian_source_foretells_other_settings(name: str, seed: int) -> None:
    weight, x = torch.randn(256, 128, generator=generator(seed)), heavy_tailed(4096, 128, seed)
    stats = Statistics({"gram": gram_of(x), "magnitude": x.abs().mean(0)}, 4096, 4096)
    low, high = (METHODS[name].changed({"bits": bits, "asymmetry": 0.0}) for bits in (2, 4))
    assert isinstance(low, Rounding)
    assert isinstance(high, Rounding)
    found = [each.solution([weight], stats, generator(seed)).relative for each in (low, high)]
    predicted = gaussian_error(low.quantizer) / gaussian_error(high.quantizer)
    assert 0.6 < found[0] / found[1] / predicted < 1.6


def _kl(state: lopro_fx.QuantState, ids: Tensor) -> float:
    found, wanted = (
        program.module()(ids).log_softmax(-1) for program in (lopro_fx.apply(_program(), state), _program())
    )
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


def _measured(method: Rounding, batches: list[Tensor]) -> tuple[list[Sensitivity], Text]:
    program = as_linears(_program())
    groups, flat = select(program, method).groups, flatten_batches(program, batches, torch.device("cpu"))
    text = text_of(program, flat)
    return list(sensitivities(program, groups, flat, text, method, None, torch.device("cpu"))), text


@pytest.mark.parametrize("method", [LoPRo(rank=0, sequential=False), LoPRo(rank=2, sequential=False), GPTQ()])
def test_what_a_sensitivity_measures(method: Rounding) -> None:
    """The divergence of a rounding alone, and of all at once."""
    batches = _batches()
    found, text = _measured(method, batches)
    assert (text.rounding, text.compared, text.checked) == ([0, 1], 2, [2])
    rounded = replace(method, bits=3, group_size=64, sequential=False)
    alone = next(each for each in found if "down_proj" in each.sites[0].name)
    state = lopro_fx.calibrate(_program(), batches[:2], replace(rounded, include=(alone.sites[0].name,)))
    assert alone.divergence * gaussian_error(rounded.quantizer) == pytest.approx(_kl(state, batches[2]), rel=1e-3)
    program = as_linears(_program())
    same = [Option({"bits": 3, "group_size": 64}, 0, 0.0)] * len(found)
    flat = flatten_batches(program, batches, torch.device("cpu"))
    together = divergence_together(program, found, same, flat, text, method, torch.device("cpu"))
    assert together == pytest.approx(_kl(lopro_fx.calibrate(_program(), batches[:2], rounded), batches[2]), rel=1e-3)


@pytest.mark.parametrize(("count", "rounding", "checked"), [(1, 1, [0]), (3, 2, [2]), (8, 7, [7]), (9, 6, [6, 7])])
def test_text_that_checks_a_division_took_no_part_in_it(count: int, rounding: int, checked: list[int]) -> None:
    text = text_of(_program(), [[batch] for batch in _batches(count)])
    assert (text.rounding, text.compared, text.checked) == (list(range(rounding)), count - 1, checked)


def test_a_division_that_is_no_better_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(bits_per_weight=4.2)
    divided = lopro_fx.plan(_program(), _batches(9), LoPRo(rank=0), budget=budget)
    assert divided.checked is not None
    assert divided.checked[0] <= divided.checked[1]
    assert len({str(choice.option.settings) for choice in divided.choices}) > 1
    results = iter((0.2, 0.1))
    monkeypatch.setattr(sys.modules["lopro_fx.plan"], "divergence_together", lambda *_: next(results))
    uniform = lopro_fx.plan(_program(), _batches(9), LoPRo(rank=0), budget=budget)
    assert uniform.checked == (0.2, 0.1)
    assert uniform.uniform is not None
    assert {str(choice.option.settings) for choice in uniform.choices} == {str(uniform.uniform.settings)}
    assert uniform.bytes == uniform.uniform.bytes
    assert "checked together 0.2 (0.1)" in str(uniform)
