from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.evaluation import builtin_text, divergence, perplexity, token_windows
from lopro_fx.evaluation.divergence import token_divergence

_DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def _brute_force(logits, original, targets):
    """Token by token, from the definitions, in float64."""
    rows = []
    for q, p, target in zip(logits.double().numpy(), original.double().numpy(), targets.numpy(), strict=True):
        q, p = np.exp(q - q.max()), np.exp(p - p.max())
        q, p = q / q.sum(), p / p.sum()
        rows.append([(p * np.log(p / q)).sum(), -np.log(q[target]), -np.log(p[target]), q.argmax() == p.argmax()])
    return torch.tensor(np.array(rows, dtype=np.float64).T)


@given(
    rows=st.integers(1, 150),
    vocabulary=st.integers(1, 70),
    spread=st.floats(0, 8),
    dtype=_DTYPES,
    seed=st.integers(0, 1000),
)
def test_against_the_definitions(rows, vocabulary, spread, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    logits, original = (spread * torch.randn(2, rows, vocabulary, generator=random)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=random)
    measured = token_divergence(logits, original, targets)
    assert measured.dtype == torch.float64
    torch.testing.assert_close(measured, _brute_force(logits, original, targets), rtol=1e-9, atol=1e-12)
    assert (measured[0] > -1e-12).all()


@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_a_constant_added_to_all_logits_changes_nothing(shift, seed):
    logits = torch.randn(9, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    measured = token_divergence(logits + shift, logits, torch.arange(9))
    torch.testing.assert_close(measured[0], torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (measured[3] == 1).all()


def test_a_token_that_the_original_rules_out_adds_nothing():
    original = torch.tensor([[0.0, 0.0, -math.inf]])
    for other in (-math.inf, 0.0):
        kl = token_divergence(torch.tensor([[0.0, 0.0, other]]), original, torch.tensor([0]))[0]
        assert kl.item() == pytest.approx(0 if other == -math.inf else math.log(3 / 2))


@pytest.fixture(scope="module")
def windows(tokenizer):
    return token_windows(tokenizer, builtin_text()[1], 90, 4)


def _run(model, noise=0.0):
    """The model's logits, with the same noise at each call."""

    def run(ids):
        logits = model(ids, use_cache=False).logits
        return logits + noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(int(ids.sum())))

    return run


def test_a_model_does_not_diverge_from_itself(llama, windows):
    result = divergence(_run(llama), _run(llama), windows, n_bytes=1000)
    assert (result.kl_mean, result.kl_stderr, result.kl_median, result.kl_p99, result.kl_max) == (0, 0, 0, 0, 0)
    assert (result.top1, result.top1_stderr) == (1, 0)
    assert (result.ln_ppl_ratio, result.ln_ppl_ratio_stderr, result.ppl_ratio) == (0, 0, 1)
    assert result.program.ppl == result.original.ppl


def test_figures_of_a_noisy_model(llama, windows):
    seen = []
    program, original = _run(llama, noise=0.5), _run(llama)
    result = divergence(program, original, windows, n_bytes=1000, progress=lambda *state: seen.append(state))
    with torch.no_grad():
        logits, others = (torch.cat([run(window[None])[0, :-1] for window in windows]) for run in (program, original))
    kl, nll, nll_original, same = _brute_force(logits, others, windows[:, 1:].flatten()).numpy()
    count = len(kl)
    assert count == 4 * 89
    assert result.kl_mean == pytest.approx(kl.mean())
    assert result.kl_stderr == pytest.approx(kl.std(ddof=1) / count**0.5)
    assert (result.kl_median, result.kl_p99, result.kl_max) == pytest.approx(
        (np.median(kl), np.quantile(kl, 0.99), kl.max())
    )
    assert result.top1 == same.mean() < 1
    assert result.top1_stderr == pytest.approx(same.std(ddof=1) / count**0.5)
    assert result.ln_ppl_ratio == pytest.approx((nll - nll_original).mean())
    assert result.ln_ppl_ratio_stderr == pytest.approx((nll - nll_original).std(ddof=1) / count**0.5)
    assert result.ppl_ratio == pytest.approx(result.program.ppl / result.original.ppl)
    for run, measured in ((program, result.program), (original, result.original)):
        expected = perplexity(run, windows, n_bytes=1000)
        assert (measured.ppl, measured.bits_per_byte, measured.tokens) == pytest.approx(
            (expected.ppl, expected.bits_per_byte, expected.tokens), rel=1e-5
        )
    assert [state[:2] for state in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[-1][2] == f"divergence {result.kl_mean:.4f}"


def test_the_ratio_is_known_better_than_either_perplexity(llama, windows):
    """Both models find the same tokens hard, so the error of the difference is the smaller one."""
    result = divergence(_run(llama, noise=0.05), _run(llama), windows)
    with torch.no_grad():
        logits = torch.cat([_run(llama)(window[None])[0, :-1] for window in windows])
    nll = _brute_force(logits, logits, windows[:, 1:].flatten())[2]
    assert 0 < result.ln_ppl_ratio_stderr < 0.2 * nll.std().item() / len(nll) ** 0.5


def test_errors(llama, windows):
    wider = lambda ids: torch.zeros(*ids.shape, 999)  # noqa: E731
    with pytest.raises(ConfigError, match=r"\b999\b.*\b384\b"):
        divergence(wider, _run(llama), windows)
    with pytest.raises(ModelError, match="window 0"):
        divergence(_run(llama), lambda ids: _run(llama)(ids) * math.nan, windows)
    for shape, words in (((0, 8), "shape"), ((2, 1), "shape"), ((8,), "shape"), ((1, 2), "predict one token")):
        with pytest.raises(ConfigError, match=words):
            divergence(wider, wider, torch.zeros(shape, dtype=torch.int64))
