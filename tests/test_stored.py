"""Folders that lopro_fx 0.1 wrote (tests/stored, made at commit 436c4fc) load and compute what they did there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lopro_fx
from lopro_fx.models import export_causal_lm
from tests.helpers import assert_close

STORED = Path(__file__).parent / "stored"


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(STORED / "expected.safetensors")


def test_a_state_of_version_2(expected: dict[str, Tensor]) -> None:
    config = AutoModelForCausalLM.from_pretrained(STORED / "folder").config
    del config.quantization_config
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({key: value for key, value in expected.items() if key.startswith("model.")}, strict=False)
    state = lopro_fx.load_state(STORED / "state")
    assert {layer.weight.format for layer in state.layers.values()} == {"affine"}
    with torch.no_grad():
        got = lopro_fx.apply(export_causal_lm(model), state).module()(expected["ids"])
    assert_close("logits", expected["logits"], got[0] if isinstance(got, tuple) else got, 1e-5)


def test_a_transformers_folder_of_format_1(expected: dict[str, Tensor], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORED / "folder")
    with torch.no_grad():
        assert_close("logits", expected["logits"], model(expected["ids"]).logits, 1e-5)
    # Saved again, it is one of today's.
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.quantization_config.format == 2
    with torch.no_grad():
        assert torch.equal(again(expected["ids"]).logits, model(expected["ids"]).logits)
