from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.evaluation import builtin_text, perplexity, predicted_bytes, read_text, token_windows
from lopro_fx.models import export_causal_lm
from tests.helpers import SHARED


def test_uniform_logits_give_the_size_of_the_vocabulary():
    result = perplexity(lambda ids: torch.zeros(*ids.shape, 50), torch.arange(40).view(4, 10), n_bytes=100)
    assert result.ppl == pytest.approx(50)
    assert result.nll_mean == pytest.approx(math.log(50))
    assert result.tokens == 36
    assert result.bits_per_byte == pytest.approx(36 * math.log2(50) / 100)
    assert result.seconds > 0


def test_each_token_is_predicted_from_the_one_before():
    """The next token is the last one + 1, and the program knows it."""
    windows = torch.arange(300)[None]

    def program(ids):
        return torch.nn.functional.one_hot(ids + 1, 400) * 1e3

    assert perplexity(program, windows).ppl == pytest.approx(1)
    assert perplexity(program, windows).bits_per_byte is None


def test_same_as_the_models_own_loss(llama, tokenizer):
    windows = token_windows(tokenizer, builtin_text()[1], 200, 3)
    program = export_causal_lm(llama).module()
    with torch.no_grad():
        losses = [llama(window[None], labels=window[None]).loss.item() for window in windows]
    assert perplexity(program, windows).nll_mean == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_stories_model_on_its_stories(stories):
    """A trained model predicts its own kind of text far better than chance, and better than it does other text."""
    path = SHARED / "data" / "tinystories.txt"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories).eval(), AutoTokenizer.from_pretrained(stories)

    def measure(text):
        windows = token_windows(tokenizer, text, 256, 4)
        program = lambda ids: model(ids, use_cache=False).logits  # noqa: E731
        return perplexity(program, windows, n_bytes=predicted_bytes(tokenizer, windows))

    own, other = measure(read_text(path)), measure(builtin_text()[1])
    assert own.bits_per_byte < 1.6
    assert own.bits_per_byte < other.bits_per_byte / 2
    assert own.ppl < other.ppl


def test_progress_counts_the_windows():
    seen = []
    perplexity(
        lambda ids: torch.zeros(*ids.shape, 8),
        torch.zeros(3, 5, dtype=torch.int64),
        progress=lambda *state: seen.append(state),
    )
    assert seen == [(1, 3, "perplexity 8.000"), (2, 3, "perplexity 8.000"), (3, 3, "perplexity 8.000")]


def test_hopeless_model_is_infinitely_perplexed():
    def program(ids):
        return torch.nn.functional.one_hot(torch.zeros_like(ids), 8) * 1e6

    assert perplexity(program, torch.ones(1, 5, dtype=torch.int64)).ppl == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(value):
    with pytest.raises(ModelError, match="window 0"):
        perplexity(lambda ids: torch.full((*ids.shape, 8), value), torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_nothing_to_predict(shape):
    with pytest.raises(ConfigError, match="shape"):
        perplexity(lambda ids: torch.zeros(*ids.shape, 8), torch.zeros(shape, dtype=torch.int64))


def test_predicted_bytes_are_those_of_all_tokens_but_the_first(any_tokenizer):
    text = builtin_text()[1][:3000]
    encoded = any_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    count = len(encoded["input_ids"]) // 50
    windows = token_windows(any_tokenizer, text, 50)
    ends = encoded["offset_mapping"]
    expected = sum(len(text[ends[50 * w + 1][0] : ends[50 * w + 49][1]].encode()) for w in range(count))
    assert predicted_bytes(any_tokenizer, windows) == expected
