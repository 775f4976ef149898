from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.evaluation import Choice, Item, read_task, score_item, zero_shot
from lopro_fx.models import export_scorer
from tests.helpers import SHARED

_TEXT = st.text(alphabet=st.sampled_from("abcdefgh .,'?\n"), max_size=25)


def _item(context: str, *endings: str, label: int = 0) -> Item:
    return Item(0, tuple(Choice(context, ending) for ending in endings), label)


def _separately(model, tokenizer, item: Item) -> list[float]:
    """One full pass for each choice, as lm-eval does it."""
    scores = []
    for choice in item.choices:
        context, ending = choice.context, choice.ending
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, ending = context[:-spaces], context[-spaces:] + ending
        given = tokenizer(context, add_special_tokens=False)["input_ids"]
        ids = tokenizer(context + ending, add_special_tokens=False)["input_ids"]
        if not given:
            given, ids = [tokenizer.bos_token_id], [tokenizer.bos_token_id, *ids]
        with torch.no_grad():
            logp = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        scores.append(sum(logp[p - 1, ids[p]].item() for p in range(len(given), len(ids))))
    return scores


@pytest.fixture(scope="module")
def scorer(llama):
    return export_scorer(llama).module()


@given(context=_TEXT, endings=st.lists(_TEXT.map(lambda text: " " + text + "x"), min_size=2, max_size=5))
def test_one_pass_scores_as_separate_passes_do(llama, tokenizer, scorer, context, endings):
    item = _item(context, *endings)
    expected = torch.tensor(_separately(llama, tokenizer, item), dtype=torch.float64)
    torch.testing.assert_close(score_item(scorer, tokenizer, item), expected, atol=1e-4, rtol=0)


@given(contexts=st.lists(_TEXT, min_size=2, max_size=4), ending=_TEXT.map(lambda text: " " + text + "x"))
def test_contexts_may_differ(llama, tokenizer, scorer, contexts, ending):
    item = Item(0, tuple(Choice(context, ending) for context in contexts), 0)
    expected = torch.tensor(_separately(llama, tokenizer, item), dtype=torch.float64)
    torch.testing.assert_close(score_item(scorer, tokenizer, item), expected, atol=1e-4, rtol=0)


@given(contexts=st.lists(_TEXT, min_size=2, max_size=4), ending=_TEXT.map(lambda text: " " + text + "x"))
def test_an_ordinary_program_scores_the_same(llama, tokenizer, scorer, contexts, ending):
    item = Item(0, tuple(Choice(context, ending) for context in contexts), 0)
    scores = score_item(lambda ids: llama(ids, use_cache=False).logits, tokenizer, item, branched=False)
    torch.testing.assert_close(scores, score_item(scorer, tokenizer, item), atol=1e-4, rtol=0)


def test_stories_model_prefers_sense(stories):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories).eval(), AutoTokenizer.from_pretrained(stories)
    scorer = export_scorer(model).module()
    item = _item("Once upon a time, there was a little", " girl named Lily.", " xyzzy grue 42.", " of of of of.")
    scores = score_item(scorer, tokenizer, item)
    expected = torch.tensor(_separately(model, tokenizer, item), dtype=torch.float64)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert int(scores.argmax()) == 0


def _uniform(ids, positions, mask, keep):
    return torch.zeros(len(keep), 1000)


def test_accuracies(tokenizer):
    """Where every token is equally likely, the fewest tokens win acc, and the fewest tokens a byte win acc_norm."""
    short, long = " q", " " + "the function " * 4
    tokens = [len(tokenizer(text)["input_ids"]) for text in (short, long)]
    assert tokens[0] < tokens[1]
    assert tokens[0] / len(short.strip()) > tokens[1] / len(long.lstrip())
    items = [_item("is", short, long, label=label) for label in (0, 0, 0, 1)]
    seen = []
    result = zero_shot(_uniform, tokenizer, items, progress=lambda *state: seen.append(state))
    assert (result.acc, result.acc_norm, result.items) == (0.75, 0.25, 4)
    assert result.acc_stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert seen[-1] == (4, 4, "accuracy 0.750")


def test_bytes_of_an_ending_are_utf8_bytes_without_the_space(tokenizer):
    """4 letters of 2 bytes each in 8 byte tokens against 5 letters in 5 tokens: one token a byte, so it's a tie."""
    item = _item("is", " ¿¿¿¿", " qzqzq")
    scores = score_item(_uniform, tokenizer, item)
    counts = [len(tokenizer(choice.ending)["input_ids"]) for choice in item.choices]
    torch.testing.assert_close(scores / scores[0], torch.tensor(counts, dtype=torch.float64) / counts[0])
    assert zero_shot(_uniform, tokenizer, [item]).acc_norm == float(counts[0] / 8 <= counts[1] / 5)


def test_errors_while_scoring(tokenizer):
    with pytest.raises(ConfigError, match="no items"):
        zero_shot(_uniform, tokenizer, [])
    with pytest.raises(ConfigError, match="item 0: ending ''"):
        score_item(_uniform, tokenizer, _item("is", "", " a"))
    with pytest.raises(ModelError, match="item 0"):
        score_item(lambda *inputs: _uniform(*inputs) * torch.nan, tokenizer, _item("is", " b", " a"))
    with pytest.raises(ModelError, match="item 0"):
        score_item(lambda ids: torch.full((*ids.shape, 1000), torch.nan), tokenizer, _item("is", " b", " a"),
                   branched=False)  # fmt: skip


def _write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_read_task(tmp_path):
    rows = (
        {"id": 7, "ctx": "Q:", "endings": [" a", "b"], "label": 1},
        "",
        {"id": "w", "ctxs": ["the cat", "the dog"], "suffix": " sat.", "label": 0},
    )
    path = _write(tmp_path / "task.jsonl", *rows)
    first = Item(7, (Choice("Q:", " a"), Choice("Q:", " b")), 1)
    second = Item("w", (Choice("the cat", " sat."), Choice("the dog", " sat.")), 0)
    assert read_task(path) == [first, second]
    assert read_task(path, 1) == [first]


@pytest.mark.parametrize(
    "row",
    [
        "{",
        "[]",
        {"id": 1, "ctx": "a", "label": 0},
        {"id": 1, "ctx": "a", "endings": [1, 2], "label": 0},
        {"id": 1, "ctx": "a", "endings": ["only"], "label": 0},
        {"id": 1, "ctx": "a", "endings": ["b", "c"], "label": 2},
        {"id": 1, "ctx": "a", "endings": ["b", "c"], "label": "0"},
    ],
)
def test_damaged_task(tmp_path, row):
    good = {"id": 0, "ctx": "a", "endings": ["b", "c"], "label": 0}
    path = _write(tmp_path / "task.jsonl", good, row)
    with pytest.raises(ConfigError) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_absent_or_empty_task(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        read_task(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="no items"):
        read_task(_write(tmp_path / "task.jsonl", ""))


@pytest.mark.parametrize(
    ("name", "count"),
    [("hellaswag_val", 10042), ("piqa_valid", 1838), ("arc_easy_test", 2376), ("winogrande_dev", 1267)],
)
def test_real_tasks(name, count):
    path = SHARED / "data" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    items = read_task(path)
    assert len(items) == count
    assert all(choice.ending.startswith(" ") for item in items for choice in item.choices)
