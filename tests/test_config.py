"""Settings: bad values are refused with the value and what is allowed, good ones survive JSON."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopro_fx import FLRQ, GPTQ, RTN, ConfigError, LoPRo, Method
from lopro_fx.kernels.formats.affine.quantizer import AffineQuantizer
from lopro_fx.methods.base import HEAD_BITS
from lopro_fx.methods.flrq import STATISTICS
from lopro_fx.methods.lopro import LOW_RANK, TRANSFORMS
from lopro_fx.methods.registry import from_dict

names = st.lists(st.text("abc.*?", min_size=1, max_size=8), max_size=3).map(tuple)


@st.composite
def configs(draw: st.DrawFn) -> Method:
    shared = {
        "bits": draw(st.sampled_from(AffineQuantizer.allowed["bits"])),
        "group_size": draw(st.sampled_from(AffineQuantizer.allowed["group_size"])),
        "include": draw(names),
        "exclude": draw(names),
        "head_bits": draw(st.sampled_from(HEAD_BITS)),
        "clip_steps": draw(st.integers(0, 1000)),
        "sequential": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }
    kind = draw(st.sampled_from((RTN, GPTQ, FLRQ, LoPRo)))
    if kind is GPTQ:
        shared["act_order"] = draw(st.sampled_from(("none", "group", "static", "column")))
    if kind is FLRQ:
        shared["rank_budget"] = draw(st.floats(0, 8))
        shared["statistic"] = draw(st.sampled_from(STATISTICS))
        shared["least_drop"] = draw(st.none() | st.floats(0, 0.99))
        shared["scale_power"] = draw(st.floats(0, 8))
    if kind is LoPRo:
        shared["rank"] = draw(st.integers(0, 4096))
        shared["transforms"] = draw(st.lists(st.sampled_from(TRANSFORMS), min_size=1, max_size=4, unique=True))
        shared["low_rank"] = draw(st.sampled_from(LOW_RANK))
        shared["damp"] = draw(st.floats(0, 10))
    return kind(**shared)


@given(configs())
def test_json_gives_the_same_settings_back(config: Method) -> None:
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("config", [RTN(), GPTQ(), FLRQ(), FLRQ.paper(), FLRQ.paper(bits=2), LoPRo(), LoPRo.paper()])
def test_defaults_are_allowed(config: Method) -> None:
    again = from_dict(config.to_dict())
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (RTN, {"bits": 5}, r"RTN\(bits=5\).*2, 3, 4, 8"),
        (GPTQ, {"group_size": 48}, r"GPTQ\(group_size=48\).*32, 64, 128, -1"),
        (LoPRo, {"rank": -1}, r"LoPRo\(rank=-1\).*0, 4096"),
        (LoPRo, {"rank": True}, r"LoPRo\(rank=True\)"),
        (RTN, {"head_bits": 2}, r"RTN\(head_bits=2\).*0, 4, 8"),
        (LoPRo, {"factor_bits": 4}, r"LoPRo\(factor_bits=4\).*8, 16"),
        (LoPRo, {"transforms": ("full", "half")}, r"transforms.*'half'.*identity, act_order, partial, full"),
        (LoPRo, {"transforms": ()}, "transforms.*identity, act_order, partial, full"),
        (LoPRo, {"block_size": 96}, r"LoPRo\(block_size=96\).*1, 2, 4"),
        (LoPRo, {"low_rank": "svd"}, r"low_rank='svd'.*block_svd, r1_sketch"),
        (GPTQ, {"damp": float("nan")}, r"GPTQ\(damp=nan\)"),
        (GPTQ, {"damp": "much"}, r"GPTQ\(damp='much'\)"),
        (GPTQ, {"act_order": "row"}, "act_order='row'.*none, group, static, column"),
        (FLRQ, {"rank_budget": -0.1}, r"FLRQ\(rank_budget=-0.1\).*0, 8"),
        (FLRQ, {"rank_budget": True}, r"FLRQ\(rank_budget=True\)"),
        (FLRQ, {"factor_bits": 4}, r"FLRQ\(factor_bits=4\).*8, 16"),
        (FLRQ, {"statistic": "mean"}, "statistic='mean'.*loss, range, amax"),
        (FLRQ, {"least_gain": -1}, r"FLRQ\(least_gain=-1\).*0, 100"),
        (FLRQ, {"slope_window": 2.5}, r"FLRQ\(slope_window=2.5\)"),
        (FLRQ, {"least_drop": 1.0}, r"FLRQ\(least_drop=1.0\)"),
        (FLRQ, {"scale_power": float("nan")}, r"FLRQ\(scale_power=nan\)"),
        (FLRQ, {"epochs": 0}, r"FLRQ\(epochs=0\).*1, 100"),
        (FLRQ, {"feedback": 1}, r"FLRQ\(feedback=1\).*True or False"),
        (FLRQ, {"refit": False}, r"FLRQ\(statistic='loss', refit=False\)"),
        (FLRQ, {"format": "trellis", "group_size": 64}, r"FLRQ\(group_size=64\).*trellis"),
        (RTN, {"clip_steps": -1}, r"RTN\(clip_steps=-1\)"),
        (RTN, {"seed": -1}, r"RTN\(seed=-1\)"),
    ],
)
def test_a_bad_value_is_named(kind: type[Method], values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        kind(**values)
    assert "\n" not in str(caught.value)


def test_one_name_may_stand_for_a_tuple_of_one() -> None:
    assert LoPRo(include="*.q", transforms="full") == LoPRo(include=("*.q",), transforms=("full",))


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        LoPRo().bits = 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magic"}, "method 'magic'.*rtn, gptq, flrq, lopro"),
        ({}, "method None"),
        ({"method": "rtn", "rank": 3}, "RTN: .*rank"),
    ],
)
def test_unknown_methods_and_fields_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(values)
