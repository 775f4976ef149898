from __future__ import annotations

import pytest

from tests.families import causal_lm


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "gemma3", "mixtral", "phi3", "opt", "gpt2"])
def model(request):
    """A tiny causal language model with random weights, of each family in turn."""
    return causal_lm(request.param)


@pytest.fixture(scope="module")
def llama():
    return causal_lm("llama")
