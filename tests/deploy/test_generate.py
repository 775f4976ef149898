from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopro_fx
from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.generation.generator import Recompute
from lopro_fx.models import export_causal_lm
from lopro_fx.passes.lookups import size_ranges, user_placeholders
from tests.families import causal_lm

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model(stories):
    return AutoModelForCausalLM.from_pretrained(stories).eval()


@pytest.fixture(scope="module")
def tokenizer(stories):
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def program(model):
    return export_causal_lm(model).module()


class Bytes:
    """A tokenizer of UTF-8 bytes."""

    eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


def _dictated(text):
    """A program whose next byte is always the next of `text`, whatever the prompt 'p' was."""

    def run(ids):
        logits = torch.zeros(*ids.shape, 256)
        following = [*text.encode(), 0]
        logits[0, -1, following[ids.shape[1] - 1]] = 1
        return logits

    return run


class _Numbers:
    """A tokenizer of numbers with spaces between them."""

    eos_token_id = None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: object, **_: object) -> str:
        return "".join(f"{int(token)} " for token in ids)


def test_greedy_text_is_that_of_transformers(model, tokenizer, program):
    ids = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=24, do_sample=False)
    pieces = []
    got = lopro_fx.generate(program, tokenizer, PROMPT, 24, stream=pieces.append)
    assert PROMPT + got == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert "".join(pieces) == got
    assert len(pieces) > 12


def test_a_cache_changes_no_text(model, tokenizer, program):
    programs = lopro_fx.export_for_generation(model, max_cache_len=64)
    expected = lopro_fx.generate(program, tokenizer, PROMPT, 24)
    pieces = []
    assert lopro_fx.generate(programs, tokenizer, PROMPT, 24, stream=pieces.append) == expected
    assert "".join(pieces) == expected
    drawn = [lopro_fx.generate(run, tokenizer, PROMPT, 12, temperature=0.8, top_k=9, top_p=0.9, seed=3)
             for run in (program, programs)]  # fmt: skip
    assert drawn[0] == drawn[1]


def test_threads_that_share_a_generator_get_their_own_texts(model, tokenizer):
    run = lopro_fx.Generator.from_programs(lopro_fx.export_for_generation(model, max_cache_len=64))
    prompts = [PROMPT, "The little dog was very", "A", "One day"] * 2
    expected = [lopro_fx.generate(run, tokenizer, prompt, 12) for prompt in prompts[:4]] * 2
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: lopro_fx.generate(run, tokenizer, prompt, 12), prompts)) == expected


def test_several_prompts_together_give_the_texts_of_each(model, tokenizer):
    run = lopro_fx.Generator.from_programs(lopro_fx.export_for_generation(model, max_cache_len=64, batch_size=4))
    prompts = [PROMPT, "The little dog was very", "A"]
    texts = lopro_fx.generate(run, tokenizer, prompts, 20)
    one = lopro_fx.export_for_generation(model, max_cache_len=64)
    assert texts == [lopro_fx.generate(one, tokenizer, prompt, 20) for prompt in prompts]
    # Where one text ends, the others go on.
    stop = tokenizer(texts[0].split()[4], add_special_tokens=False)["input_ids"]
    ended = lopro_fx.generate(run, tokenizer, prompts, 20, stop=stop)
    assert len(ended[0]) < len(texts[0])
    assert all(whole.startswith(part) for whole, part in zip(texts, ended, strict=True))
    with pytest.raises(ConfigError, match=r"\b5 prompts\b.*\b4\b"):
        lopro_fx.generate(run, tokenizer, [PROMPT] * 5)
    with pytest.raises(ConfigError, match="stream"):
        lopro_fx.generate(run, tokenizer, prompts, stream=print)


def test_a_text_that_fills_the_cache_is_returned(model, tokenizer, program):
    """As streamed and as a list, too: what was written before the cache was full is not lost."""
    prompt = len(tokenizer(PROMPT)["input_ids"])
    programs = lopro_fx.export_for_generation(model, max_cache_len=prompt + 9, batch_size=2)
    run = lopro_fx.Generator.from_programs(programs)
    # The last token needs no place: nothing comes after it.
    expected = lopro_fx.generate(program, tokenizer, PROMPT, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lopro_fx.generate(run, tokenizer, PROMPT, 10) == expected
    pieces = []
    for given, options in ((PROMPT, {}), (PROMPT, {"stream": pieces.append}), ([PROMPT, PROMPT], {})):
        with pytest.warns(UserWarning, match=rf"\b{prompt + 9}\b.*\b10 of 40\b"):
            got = lopro_fx.generate(run, tokenizer, given, 40, **options)
        assert got == (expected if given is PROMPT else [expected, expected])
    assert "".join(pieces) == expected
    with pytest.raises(ConfigError, match=rf"\b{prompt + 9}\b"):
        lopro_fx.generate(run, tokenizer, PROMPT * 9, 4)


def test_a_text_ends_at_the_positions_that_the_model_knows(tokenizer) -> None:
    model = causal_lm("opt")
    program = export_causal_lm(model)
    longest = int(size_ranges(program, user_placeholders(program)[0])[1][1])
    with pytest.warns(UserWarning, match=rf"\b{longest}\b"):
        text = lopro_fx.generate(program, _Numbers(), "5 6 7", longest)
    assert len(text.split()) == longest - 2
    with pytest.raises(ConfigError, match=rf"\b{longest}\b"):
        lopro_fx.generate(program, _Numbers(), " ".join("5" * (longest + 1)), 1)


def test_draws_depend_on_the_seed_alone(tokenizer, program):
    texts = [lopro_fx.generate(program, tokenizer, PROMPT, 12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_stops_at_the_end_token_and_at_chosen_ones():
    assert lopro_fx.generate(_dictated("abc"), Bytes(), "p", 50) == "abc"
    assert lopro_fx.generate(_dictated("abc"), Bytes(), "p", 50, stop=[ord("c")]) == "ab"
    assert lopro_fx.generate(_dictated("abc"), Bytes(), "p", 2) == "ab"


def test_stream_holds_back_a_character_until_it_is_whole():
    pieces = []
    assert lopro_fx.generate(_dictated("a€b"), Bytes(), "p", 50, stream=pieces.append) == "a€b"
    assert pieces == ["a", "€", "b"]


def test_a_character_that_stays_cut_is_shown_at_the_end():
    pieces = []
    got = lopro_fx.generate(_dictated("a€"), Bytes(), "p", 2, stream=pieces.append)
    assert "".join(pieces) == got == "a\ufffd"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt"),
        ("p", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("p", {"temperature": -0.5}, "temperature=-0.5"),
        ("p", {"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_refusals(prompt, options, message):
    with pytest.raises(ConfigError, match=message):
        lopro_fx.generate(_dictated("a"), Bytes(), prompt, **options)


def test_logits_that_are_not_finite():
    with pytest.raises(ModelError, match="not finite"):
        lopro_fx.generate(lambda ids: torch.full((1, ids.shape[1], 256), float("nan")), Bytes(), "p")


def test_padding_of_a_program_without_a_cache_is_refused() -> None:
    model = Recompute(lambda ids: torch.zeros(*ids.shape, 5))
    assert model.prefill(torch.ones(1, 3, dtype=torch.int64), torch.zeros(1)).shape == (1, 5)
    with pytest.raises(ConfigError, match="takes one prompt, which is never padded"):
        model.prefill(torch.ones(1, 3, dtype=torch.int64), torch.ones(1))
