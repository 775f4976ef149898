"""Token ids that a model doesn't know are refused by name, before it runs, wherever text comes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lopro_fx
from lopro_fx import RTN, ConfigError
from lopro_fx.evaluation import Choice, Item, divergence, perplexity, zero_shot
from lopro_fx.evaluation.likelihood import continuation
from lopro_fx.models import export_causal_lm
from lopro_fx.passes.lookups import size_ranges, table_rows, user_placeholders
from lopro_fx.tokens import require_length
from tests.families import VOCAB, causal_lm, family

MESSAGE = rf"token id {VOCAB + 3}\b.*\b{VOCAB} rows"


class Spaced:
    """A tokenizer of numbers with spaces between them."""

    eos_token_id, bos_token_id = 2, 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(token)) for token in ids)


@pytest.fixture(scope="module")
def packed():
    """A quantised program with a packed embedding."""
    return lopro_fx.quantize(family("llama").program, None, RTN(bits=4, group_size=32, head_bits=8))


@pytest.fixture(scope="module")
def programs():
    return lopro_fx.export_for_generation(causal_lm("llama"), max_cache_len=16)


def _windows(*more: int) -> Tensor:
    return torch.tensor([[5, 6, 7, 8], [5, 6, *(more or (7, 8))]])


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt2", "bert"])
def test_the_table_of_tokens_is_found_among_others(name: str) -> None:
    chosen = family(name).program
    assert table_rows(chosen) == table_rows(chosen.module()) == VOCAB


def test_programs_without_one_are_not_checked(packed, programs) -> None:
    assert table_rows(family("vit").program) is None
    assert table_rows(packed) == table_rows(programs.decode) == VOCAB
    assert perplexity(lambda ids: torch.zeros(*ids.shape, 200), _windows(9, VOCAB + 3)).tokens == 6


@pytest.mark.parametrize("wrong", [VOCAB + 3, -4])
def test_evaluation_names_the_id(packed, wrong: int) -> None:
    ran: list[int] = []
    dense, small = family("llama").program.module(), packed.module()
    calls: list[Callable[[], Any]] = [
        lambda: perplexity(small, _windows(9, wrong), progress=lambda *_: ran.append(1)),
        lambda: divergence(dense, small, _windows(9, wrong), progress=lambda *_: ran.append(1)),
        lambda: continuation(dense, [5, wrong, 6], 1),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=rf"token id {wrong}\b.*\b{VOCAB} rows"):
            call()
    assert not ran
    assert perplexity(small, _windows(9, VOCAB - 1)).tokens == 6


def test_tasks_are_checked_before_the_first_item() -> None:
    def item(name: str, ending: str) -> Item:
        return Item(name, (Choice("5 6", " 7"), Choice("5 6", ending)), 0)

    done: list[int] = []
    items = [item("good", " 8"), item("bad", f" {VOCAB + 3}")]
    program = export_causal_lm(causal_lm("llama")).module()
    with pytest.raises(ConfigError, match=rf"item bad\b.*{MESSAGE}"):
        zero_shot(program, Spaced(), items, branched=False, progress=lambda *_: done.append(1))
    assert not done
    assert zero_shot(program, Spaced(), items[:1], branched=False).items == 1


def test_a_prompt_is_checked(packed, programs) -> None:
    for model in (packed, programs, lopro_fx.Generator.from_programs(programs)):
        with pytest.raises(ConfigError, match=f"prompt.*{MESSAGE}"):
            lopro_fx.generate(model, Spaced(), f"5 {VOCAB + 3} 6", 2)
        assert lopro_fx.generate(model, Spaced(), "5 6", 2)


def test_windows_longer_than_the_export_are_refused_by_their_length() -> None:
    program = export_causal_lm(causal_lm("opt"))
    longest = int(size_ranges(program, user_placeholders(program)[0])[1][1])
    require_length(program, longest, "--seq-len")
    with pytest.raises(
        ConfigError, match=rf"--seq-len {longest + 1}: the model was exported for 1 to {longest} tokens"
    ):
        require_length(program, longest + 1, "--seq-len")
    require_length(export_causal_lm(causal_lm("llama")), 1 << 20, "--seq-len")
