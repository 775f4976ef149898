from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.generation.sampling import Sampler
from tests.helpers import generator


@given(st.integers(0, 100), st.floats(0.3, 3), st.integers(1, 12), st.floats(0.05, 1))
def test_only_what_transformers_keeps_is_drawn(seed, temperature, top_k, top_p):
    logits = torch.randn(3, 9, generator=generator(seed)) * 3
    kept = TemperatureLogitsWarper(temperature)(None, logits)
    kept = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, kept))
    sampler = Sampler(temperature, top_k, top_p, seed)
    for _ in range(20):
        tokens = sampler.pick(logits)
        assert torch.isfinite(kept[torch.arange(3), tokens]).all()


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(20_000, 1)
    counts = torch.bincount(Sampler(1.5, 3).pick(logits), minlength=4) / 20_000
    expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0, -torch.inf]) / 1.5, -1)
    torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [1e-5, 1e-20, 1e-40, 1e-300, 5e-324])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e38])
def test_a_temperature_close_to_0_takes_the_likeliest(temperature, scale):
    logits = torch.randn(4, 50, generator=generator()).clamp(-3, 3) * scale
    sampler = Sampler(temperature, 5, 0.9)
    assert sampler.pick(logits).equal(logits.argmax(-1))


def test_equal_logits_at_a_temperature_close_to_0_are_not_drawn():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    assert {Sampler(1e-40, seed=seed).pick(logits).item() for seed in range(20)} == {1}


@given(st.integers(0, 100))
def test_the_likeliest_token_always_stays(seed):
    logits = torch.randn(4, 7, generator=generator(seed))
    assert Sampler(0.7, 1).pick(logits).equal(logits.argmax(-1))
    assert Sampler(0.7, 0, 1e-6).pick(logits).equal(logits.argmax(-1))
    assert Sampler().pick(logits.bfloat16()).equal(logits.bfloat16().argmax(-1))


def test_a_seed_repeats_its_draws():
    logits = torch.randn(2, 50, generator=generator())
    draws = [[sampler.pick(logits).tolist() for _ in range(5)] for sampler in (Sampler(2.0, seed=s) for s in (1, 1, 2))]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"seed": 1 << 70}, "seed="),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(**settings)


def test_logits_that_are_not_finite():
    with pytest.raises(ModelError, match="not finite"):
        Sampler().pick(torch.tensor([[0.0, float("inf")]]))
