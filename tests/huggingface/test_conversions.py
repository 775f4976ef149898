"""Families whose files hold weights of several Linears as one: packed tensors keep their names and shapes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lopro_fx
from lopro_fx.layer import dense_weight
from lopro_fx.models.export import export_causal_lm, export_view
from tests.helpers import assert_close, generator

_SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
          "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("head_bits", [0, 8])
@torch.no_grad()
def test_joined_projections_survive_a_folder_twice(head_bits: int, tmp_path) -> None:
    if not hasattr(transformers, "GteForMaskedLM"):
        pytest.skip("this transformers has no GTE, which joins q, k and v in files")
    torch.manual_seed(0)
    model: Any = transformers.GteForMaskedLM(transformers.GteConfig(**_SIZES)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 97, (2, 9), generator=generator())
    plain = type(model).forward
    program = export_view(model, lambda self, input_ids: plain(self, input_ids=input_ids).logits, (ids,), None)
    config = lopro_fx.LoPRo(bits=4, group_size=32, rank=2, refits=0, sweeps=0, clip_steps=2, head_bits=head_bits)
    state = lopro_fx.calibrate(program, [(ids,)], config)
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    for name, site in state.layers.items():
        twin.get_submodule(name).weight.copy_(dense_weight(state.inputs[site.input], site))
    expected = twin(input_ids=ids).logits
    lopro_fx.save_pretrained(model, state, tmp_path / "first", activations="float")
    loaded = type(model).from_pretrained(tmp_path / "first")
    assert_close("loaded", expected, loaded(input_ids=ids).logits, 2e-5)
    loaded.save_pretrained(tmp_path / "second")
    again = type(model).from_pretrained(tmp_path / "second")
    assert torch.equal(again(input_ids=ids).logits, loaded(input_ids=ids).logits)
    again.dequantize()
    again.save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    assert_close("dense", expected, dense(input_ids=ids).logits, 2e-5)


@torch.no_grad()
def test_a_loaded_model_of_such_a_family_is_pickled_and_copied(tmp_path) -> None:
    """transformers keeps the conversions with the model: Mixtral's join experts."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    model: Any = transformers.MixtralForCausalLM(config).eval()
    state = lopro_fx.calibrate(export_causal_lm(model), None, lopro_fx.RTN(bits=4, group_size=32))
    lopro_fx.save_pretrained(model, state, tmp_path / "first", activations="float")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    ids = torch.randint(3, 97, (2, 9), generator=generator())
    expected = loaded(ids).logits
    for copied in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert torch.equal(copied(ids).logits, expected)
        copied.save_pretrained(tmp_path / "again")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(ids).logits, expected)
