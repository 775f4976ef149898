"""What is measured of activations: exact, independent of how they are split, and never silently not a number."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopro_fx.calibration import statistics
from lopro_fx.errors import CalibrationError
from lopro_fx.methods.observers import Gram, Magnitude, Statistics
from tests.helpers import assert_close, generator, heavy_tailed


def measure(inputs: list[torch.Tensor], name: str, node: str, **options) -> Statistics:
    return statistics.measure(inputs, name, node, [Gram(), Magnitude()], **options)


@given(st.integers(1, 40), st.lists(st.integers(0, 60), max_size=4), st.integers(0, 99), st.sampled_from((None, 16.0)))
def test_how_tokens_are_split_into_batches_does_not_matter(tokens: int, cuts: list[int], seed: int, clip) -> None:
    x = heavy_tailed(tokens, 24, seed)
    options = {} if clip is None else {"token_clip": clip}
    whole = measure([x], "layer", "node", **options)
    bounds = sorted({0, tokens, *(cut % tokens for cut in cuts)})
    parts = measure([x[a:b] for a, b in pairwise(bounds)], "layer", "node", **options)
    assert parts.tokens == whole.tokens == tokens
    assert_close("Gram", whole.gram, parts.gram, 1e-5)
    assert_close("magnitude", whole.magnitude, parts.magnitude, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_shape_and_dtype_is_tokens_by_features(dtype: torch.dtype) -> None:
    x = heavy_tailed(24, 8).to(dtype)
    stats = measure([x.view(2, 3, 4, 8)], "layer", "node")
    wide = x.double()
    assert stats.gram.dtype == stats.magnitude.dtype == torch.float32
    assert stats.tokens == 24
    assert_close("Gram", wide.T @ wide / 24, stats.gram, 1e-6)
    assert_close("magnitude", wide.abs().mean(0), stats.magnitude, 1e-6)
    assert torch.equal(stats.gram, stats.gram.T)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_found(value: float) -> None:
    good, bad = heavy_tailed(6, 8), heavy_tailed(6, 8)
    bad[4, 3] = value
    with pytest.raises(CalibrationError, match=r"'mul_7'.*'blocks\.0\.q'.*batch 1, row 4"):
        measure([good, bad], "blocks.0.q", "mul_7")


def test_one_large_token_is_clipped_in_the_gram_only() -> None:
    x = torch.randn(200, 16, generator=generator())
    sink = x.clone()
    sink[17] *= 1e4
    plain, clipped = measure([sink], "layer", "node"), measure([sink], "layer", "node", token_clip=4.0)
    # The token counts as four median ones, so the mean square of all is what it was, but for that.
    assert plain.gram.trace() > 1e4 * clipped.gram.trace()
    assert clipped.gram.trace() == pytest.approx(measure([x], "layer", "node").gram.trace().item(), rel=0.1)
    assert torch.equal(clipped.magnitude, plain.magnitude)
    assert clipped.tokens == 200


def test_a_wide_enough_clip_changes_nothing() -> None:
    x = torch.randn(50, 16, generator=generator())
    assert torch.equal(measure([x], "layer", "node", token_clip=1e6).gram, measure([x], "layer", "node").gram)


def test_tokens_that_are_mostly_zero_keep_the_others() -> None:
    x = torch.zeros(50, 16)
    x[:10] = torch.randn(10, 16, generator=generator())
    clipped = measure([x], "layer", "node", token_clip=100.0)
    assert_close("Gram", x.T @ x / 50, clipped.gram, 1e-6)


def test_no_data_is_an_identity_gram() -> None:
    stats = statistics.data_free(5, [Gram(), Magnitude()])
    assert torch.equal(stats.gram, torch.eye(5))
    assert torch.equal(stats.magnitude, torch.ones(5))
    assert stats.tokens == 0
