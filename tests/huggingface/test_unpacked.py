"""Weights that are no Linear's in a transformers model: a bare parameter, and a Linear that computes more."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lopro_fx
from lopro_fx.huggingface.listing import REPORT
from lopro_fx.layer import dense_weight
from lopro_fx.models import export_causal_lm
from tests.helpers import assert_close, generator
from tests.huggingface.models import CONFIG, VOCAB, token_ids

_ODD = ("model.layers.0.mlp.fn", "model.layers.0.mlp.twice")


class _Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Mlp(nn.Module):
    """Reads one value with a Linear, a parameter stored (in_features, out_features), and a Linear of another kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # In the order of use: the group's first member is one that can't be packed.
        self.fn = nn.Parameter(torch.empty(width, width).normal_(std=0.3, generator=generator(1)))
        self.twice = _Twice(width, width)
        self.plain = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.fn).relu() + self.twice(x).relu() + self.plain(x)


class _Model(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[0].mlp = _Mlp(config.hidden_size)
        self.post_init()


def _model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.3}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=1, bos_token_id=1, eos_token_id=None, **sizes)
    return _Model(config).eval()


def _twin(state: lopro_fx.QuantState) -> Any:
    model = _model()
    with torch.no_grad():
        for name, site in state.layers.items():
            dense = dense_weight(state.inputs[site.input], site)
            if name == _ODD[0]:
                model.get_parameter(name).copy_(dense.T)
            else:
                model.get_parameter(f"{name}.weight").copy_(dense)
    return model


@torch.no_grad()
def test_they_are_stored_dense_with_a_warning_and_compute_what_was_solved(tmp_path) -> None:
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = lopro_fx.calibrate(export_causal_lm(model), [token_ids(2, 16)], CONFIG)
    assert set(_ODD) < set(state.layers)
    assert state.layers["model.layers.0.mlp.plain"].input == _ODD[0]
    with pytest.warns(UserWarning, match=r"\b2\b.*dense.*mlp\.fn"):
        lopro_fx.save_pretrained(model, state, tmp_path / "packed", activations="float")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids = token_ids(2, 9, seed=3)
    loaded = _Model.from_pretrained(tmp_path / "packed")
    expected = _twin(state)(ids).logits
    assert_close("loaded", expected, loaded(ids).logits, 2e-5)
    assert loaded.get_submodule("model.layers.0.mlp.plain").shared.down is not None
    report = json.loads((tmp_path / "packed" / REPORT).read_text())
    assert [name for name, reason in report["skipped"] if "dense" in reason] == list(_ODD)
    assert {row["name"] for row in report["layers"]} == set(state.layers) - set(_ODD)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(_Model.from_pretrained(tmp_path / "again")(ids).logits, loaded(ids).logits)


@torch.no_grad()
def test_a_state_of_nothing_else_makes_a_plain_folder(tmp_path) -> None:
    model = _model()
    program = export_causal_lm(model)
    state = lopro_fx.calibrate(program, None, lopro_fx.RTN(bits=4, group_size=32, include=_ODD))
    assert set(state.layers) == set(_ODD)
    with pytest.warns(UserWarning, match=r"\b2\b.*dense"):
        lopro_fx.save_pretrained(model, state, tmp_path / "packed")
    ids = token_ids(2, 9)
    assert_close("loaded", _twin(state)(ids).logits, _Model.from_pretrained(tmp_path / "packed")(ids).logits, 2e-5)


def test_a_weight_that_is_offloaded_is_refused_by_name() -> None:
    model = _model()
    state = lopro_fx.calibrate(export_causal_lm(model), None, lopro_fx.RTN(bits=4, group_size=32))
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.fn = nn.Parameter(mlp.fn.to("meta"))
    with pytest.raises(lopro_fx.ModelError, match=r"mlp\.fn'.*offloaded"):
        lopro_fx.pack_model(model, state)


class _Tied(LlamaForCausalLM):
    """Two Linears share a weight, and its head shares one with an embedding that is no nn.Embedding."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        attention = self.model.layers[0].self_attn
        attention.o_proj.weight = attention.q_proj.weight
        self.model.embed_tokens = _Table(config.vocab_size, config.hidden_size)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.post_init()


class _Table(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width).normal_(std=0.3, generator=generator(2)))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


@torch.no_grad()
def test_what_shares_a_packed_weight_and_cannot_read_it_holds_the_same_numbers(tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.3}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=1, bos_token_id=1, eos_token_id=None, **sizes)
    model = _Tied(config).eval()
    program = export_causal_lm(model)
    state = lopro_fx.calibrate(program, None, lopro_fx.RTN(bits=3, group_size=32, head_bits=4))
    ids = token_ids(2, 9)
    expected = lopro_fx.apply(program, state).module()(ids)
    with pytest.warns(UserWarning, match="2 quantised weights are stored dense"):
        lopro_fx.save_pretrained(model, state, tmp_path / "packed", activations="float")
    loaded = _Tied.from_pretrained(tmp_path / "packed")
    assert_close("loaded", expected, loaded(ids).logits, 2e-5)
