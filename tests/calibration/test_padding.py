"""Padding that the attention mask hides counts nowhere: a padded batch measures what its texts do one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import LlamaForCausalLM

import lopro_fx
from lopro_fx.calibration.batches import flatten_batches
from lopro_fx.calibration.importance import measure_importance
from lopro_fx.calibration.replay import Replay
from lopro_fx.methods.observers import Statistics
from lopro_fx.passes.sites import find_sites
from tests.helpers import assert_close
from tests.huggingface.models import case, token_ids

LENGTHS = (5, 12, 8)
TEXTS = [token_ids(1, length, seed) for seed, length in enumerate(LENGTHS)]


def _padded(side: str, dtype: torch.dtype) -> dict[str, Tensor]:
    ids, mask = torch.full((3, 12), 7), torch.zeros(3, 12, dtype=dtype)
    for row, text in enumerate(TEXTS):
        length = text.shape[1]
        place = slice(12 - length, 12) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = text[0], 1
    return {"input_ids": ids, "attention_mask": mask}


class _Logits(nn.Module):
    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def _program(dtype: torch.dtype) -> ExportedProgram:
    sizes = {0: Dim("batch", min=1), 1: Dim("sequence", min=2)}
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    return torch.export.export(_Logits(case("tied").model), (), _padded("left", dtype), dynamic_shapes=shapes,
                               strict=False)  # fmt: skip


def _measured(program: ExportedProgram, batches: list[dict[str, Any]], importance: bool) -> dict[str, Statistics]:
    groups = find_sites(program).groups
    flat = flatten_batches(program, batches)
    weights = measure_importance(program, groups, flat, 0) if importance else None
    replay = Replay(program, groups, flat, lopro_fx.LoPRo(), weights, torch.device("cpu"))
    return {unit.name: seen for unit, seen in replay.units()}


@pytest.mark.parametrize("importance", [False, True], ids=["even", "by gradient"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_padded_batch_measures_what_its_texts_do(dtype: torch.dtype, importance: bool) -> None:
    program = _program(dtype)
    single = [{"input_ids": text, "attention_mask": torch.ones_like(text, dtype=dtype)} for text in TEXTS]
    want = _measured(program, single, importance)
    for side in ("left", "right"):
        got = _measured(program, [_padded(side, dtype)], importance)
        assert got.keys() == want.keys()
        for name, stats in got.items():
            assert stats.tokens == want[name].tokens == sum(LENGTHS)
            assert abs(stats.distinct - want[name].distinct) <= 1
            assert_close(f"{side} Gram of {name}", want[name].gram, stats.gram, 1e-4)
            assert_close(f"{side} magnitude of {name}", want[name].magnitude, stats.magnitude, 1e-5)
            if importance:
                assert_close(f"{side} rows of {name}", want[name].rows, stats.rows, 1e-3)


def test_what_no_mask_hides_counts() -> None:
    program = _program(torch.int64)
    batch = _padded("left", torch.int64)
    whole = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert {stats.tokens for stats in _measured(program, [whole], False).values()} == {36}
