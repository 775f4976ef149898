"""Calibration on next to nothing: never worse than without data, said once, and no tiny loss in the report."""

from __future__ import annotations

import math
import statistics
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional

import lopro_fx
from lopro_fx import GPTQ, RTN, LoPRo, Method
from lopro_fx.models import export_causal_lm, load_model
from tests.helpers import SHARED
from tests.programs import decoder, ids


@pytest.fixture(scope="module")
def story_model(stories: Path) -> tuple[ExportedProgram, list[Tensor]]:
    """(program, stories that begin with BOS); the second half of them is for evaluation."""
    text = SHARED / "data" / "tinystories.txt"
    if not text.is_file():
        pytest.skip(f"{text} is absent")
    loaded = load_model(str(stories), torch.float32)
    parts = [part.strip() for part in text.read_text().split("<|endoftext|>") if part.strip()]
    tokens = [[1, *loaded.tokenizer(part, add_special_tokens=False)["input_ids"]] for part in parts]
    return export_causal_lm(loaded.model), [torch.tensor([story[:512]]) for story in tokens]


def _perplexity(program: ExportedProgram, texts: list[Tensor]) -> float:
    module, nats, count = program.module(), 0.0, 0
    with torch.no_grad():
        for text in texts:
            logits = module(text)[0, :-1]
            nats += functional.cross_entropy(logits, text[0, 1:], reduction="sum").item()
            count += logits.shape[0]
    return math.exp(min(nats / count, 700))


# What rounding to nearest gives there: 7.98.
@pytest.mark.parametrize("method", [LoPRo(bits=3, rank=16), GPTQ(bits=3)], ids=["lopro", "gptq"])
@pytest.mark.parametrize("case", ["16 tokens", "one token", "48 tokens"])
def test_few_tokens_do_not_explode(
    story_model: tuple[ExportedProgram, list[Tensor]], method: Method, case: str
) -> None:
    program, texts = story_model
    batches = {"16 tokens": [texts[0][:, :16]], "one token": [torch.full((1, 512), 5)] * 4,
               "48 tokens": [texts[0][:, :48]]}[case]  # fmt: skip
    with pytest.warns(UserWarning, match="distinct tokens"):
        quantized = lopro_fx.quantize(program, batches, method)
    assert _perplexity(quantized, texts[160:180]) < (5.8 if isinstance(method, LoPRo) else 8.5)
    rows = lopro_fx.report(quantized).rows
    assert all("distinct tokens" in row["warning"] for row in rows)
    # As much as the weights lose, not the nothing that few tokens lose: 3e-5 at 16 tokens, without a prior.
    assert statistics.median(row["relative_loss"] for row in rows) > 1e-3


@pytest.mark.parametrize("config", [LoPRo(bits=4, group_size=32, rank=2), GPTQ(bits=4, group_size=32)])
def test_few_tokens_are_said_once(config: Method) -> None:
    _, program = decoder()
    for batches, count in (([ids(1, 4)], 1), ([ids(8, 60, seed=i) for i in range(4)], 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = lopro_fx.calibrate(program, batches, config)
        said = [str(item.message) for item in caught if "distinct tokens" in str(item.message)]
        assert len(said) == count, said
        assert all("8 of 8 groups" in text and "blocks." in text for text in said)
        assert all(("warning" in site.metrics) == bool(count) for site in state.layers.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lopro_fx.calibrate(program, [ids(1, 4)], RTN(bits=4, group_size=32))


def test_batches_without_tokens_are_data_free() -> None:
    _, program = decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = lopro_fx.calibrate(
            program, [torch.zeros(1, 0, dtype=torch.int64)], LoPRo(bits=4, group_size=32, rank=2)
        )
        free = lopro_fx.calibrate(program, None, LoPRo(bits=4, group_size=32, rank=2))
    for name, site in free.layers.items():
        assert all(torch.equal(empty.layers[name].tensors[key], tensor) for key, tensor in site.tensors.items())
