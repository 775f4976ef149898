from __future__ import annotations

import random
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lopro_fx.errors import ConfigError
from lopro_fx.evaluation import builtin_text, read_text, token_windows
from tests.helpers import SHARED


def _paragraphs(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


def test_builtin_texts_share_no_paragraph():
    calibration, evaluation = builtin_text()
    assert _paragraphs(calibration).isdisjoint(_paragraphs(evaluation))
    assert builtin_text() == (calibration, evaluation)


def test_builtin_texts_are_long_enough():
    """32 windows of 512 tokens to calibrate and 24 to evaluate, where a token has up to 4 characters (SmolLM2: 4.1)."""
    calibration, evaluation = builtin_text()
    assert len(calibration) > 32 * 512 * 4
    assert len(evaluation) > 24 * 512 * 4


def test_windows_are_the_tokens_in_order(any_tokenizer):
    text = builtin_text()[1][:5000]
    ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = token_windows(any_tokenizer, text, 64)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(ids) // 64, 64)
    assert windows.flatten().tolist() == ids[: windows.numel()]


@st.composite
def _texts(draw, words: int) -> str:
    vocabulary = draw(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=30))
    gaps = draw(st.lists(st.text(alphabet=" \n\t\r\u00a0", max_size=3), min_size=1, max_size=4))
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    return "".join(rng.choice(vocabulary) + rng.choice(gaps) for _ in range(words))


@given(text=_texts(2500), seq_len=st.integers(1, 70), max_windows=st.integers(1, 9))
def test_part_of_the_text_gives_the_windows_of_all(any_tokenizer, text, seq_len, max_windows):
    everything = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    assume(len(everything) >= seq_len)
    count = min(max_windows, len(everything) // seq_len)
    windows = token_windows(any_tokenizer, text, seq_len, max_windows)
    assert windows.flatten().tolist() == everything[: count * seq_len]


@pytest.mark.parametrize("name", ["wikitext2_test.txt", "c4_calib.txt"])
def test_part_of_real_text_gives_the_windows_of_all(any_tokenizer, name):
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    text = read_text(path)[:300_000]
    everything = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert token_windows(any_tokenizer, text, 512, 24).flatten().tolist() == everything[: 24 * 512]


class _Unsure:
    """A tokenizer of numbers, of whose tokens the last 40 depend on where the text ends."""

    def __call__(self, text, **_):
        words = [int(word) for word in text.split()]
        return {"input_ids": words[:-40] + [word + 100_000 for word in words[-40:]]}


def test_tokens_that_a_cut_changes_are_not_used():
    text = " ".join(f"{number:05}" for number in range(5000))
    assert token_windows(_Unsure(), text, 64, 4).flatten().tolist() == list(range(256))


class _Counting:
    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.tokenizer(text, **options)


def test_only_the_text_that_is_needed_is_tokenised(tokenizer):
    counting = _Counting(tokenizer)
    token_windows(counting, builtin_text()[0], 64, 4)
    assert 0 < counting.characters < 20_000


def test_text_without_a_space_is_tokenised_whole(tokenizer):
    windows = token_windows(tokenizer, "x" * 20_000, 16, 2)
    assert windows.shape == (2, 16)


@pytest.mark.parametrize(
    ("text", "seq_len", "max_windows", "message"),
    [
        ("too short", 100, None, r"\b100\b"),
        ("too short", 100, 3, r"\b100\b"),
        ("", 1, None, "0 tokens"),
        ("text", 0, None, "seq_len=0"),
        ("text", 1, 0, "max_windows=0"),
    ],
)
def test_bad_windows(tokenizer, text, seq_len, max_windows, message):
    with pytest.raises(ConfigError, match=message) as caught:
        token_windows(tokenizer, text, seq_len, max_windows)
    assert "\n" not in str(caught.value)


def test_read_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Grüße\n", encoding="utf-8")
    assert read_text(path) == "Grüße\n"
    assert read_text(str(path)) == "Grüße\n"


@pytest.mark.parametrize(("content", "message"), [(b"", "empty"), (b" \n", "empty"), (b"ab\xff", "byte 2")])
def test_unusable_text(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_text(path)
    assert str(path) in str(caught.value)


def test_text_that_is_absent_or_a_folder(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
            read_text(path)
        assert str(path) in str(caught.value)
