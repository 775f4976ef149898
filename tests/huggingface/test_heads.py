"""Output projections of many families: what their models tie stays tied through a folder, and nothing else is lost."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lopro_fx
from lopro_fx import RTN
from lopro_fx.errors import CheckpointError
from lopro_fx.models.export import export_view
from tests.helpers import assert_close, generator

VOCAB = 97
# Of logits in fp32, from weights that are five times as large as those that models start with.
TOLERANCE = 2e-5
_COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
           "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
           "pad_token_id": 0}  # fmt: skip
_GPTJ = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_FUNNEL = {"vocab_size": VOCAB, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1],
           "num_decoder_layers": 1}  # fmt: skip
# By class: configuration, and what it adds to the common one (or replaces, where a dict of all is given).
_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # A bias with two names beside the tied weight.
    "BertForMaskedLM": ("BertConfig", _COMMON),
    "MPNetForMaskedLM": ("MPNetConfig", _COMMON),
    "AlbertForMaskedLM": ("AlbertConfig", {**_COMMON, "embedding_size": 32}),
    # The head is made before the embedding.
    "XLMRobertaForMaskedLM": ("XLMRobertaConfig", _COMMON),
    # The class initialises its head, or its embedding, by name.
    "ModernBertForMaskedLM": ("ModernBertConfig", {**_COMMON, "decoder_bias": True, "cls_token_id": 1,
                                                   "sep_token_id": 2}),
    "FunnelForMaskedLM": ("FunnelConfig", _FUNNEL),
    # A head with a bias of its own, untied and tied.
    "GPTJForCausalLM": ("GPTJConfig", _GPTJ),
    "PhiForCausalLM": ("PhiConfig", {**_COMMON, "tie_word_embeddings": True}),
    # An embedding that scales what it looks up.
    "Gemma2ForCausalLM": ("Gemma2Config", {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}),
}  # fmt: skip


def _ids(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (2, 8), generator=generator(seed))


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model(input_ids=_ids()).logits


@functools.cache
def _model(name: str) -> Any:
    """With weights and biases far from zero; not to be changed."""
    torch.manual_seed(0)
    config, values = _CASES[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@functools.cache
def _program(name: str) -> Any:
    model = _model(name)
    plain = type(model).forward
    return export_view(
        model, lambda self, input_ids: plain(self, input_ids=input_ids).logits, (_ids(),), {"input_ids": None}
    )


@functools.cache
def _state(name: str, head_bits: int) -> lopro_fx.QuantState:
    return lopro_fx.calibrate(_program(name), None, RTN(bits=8, group_size=32, head_bits=head_bits))


def _saved(name: str, folder: Any, head_bits: int = 8) -> Any:
    lopro_fx.save_pretrained(_model(name), _state(name, head_bits), folder, activations="float")
    return folder


@pytest.mark.parametrize("head_bits", [0, 8])
@pytest.mark.parametrize("name", _CASES)
def test_a_folder_computes_what_the_program_does(name: str, head_bits: int, tmp_path) -> None:
    state = _state(name, head_bits)
    with torch.no_grad():
        expected = lopro_fx.apply(_program(name), state).module()(_ids())
    assert any(site.embedding for site in state.layers.values()) == bool(head_bits)
    assert_close("packed", expected, _logits(lopro_fx.pack_model(_model(name), state, activations="float")), TOLERANCE)
    loaded = type(_model(name)).from_pretrained(_saved(name, tmp_path / "model", head_bits))
    assert_close("loaded", expected, _logits(loaded), TOLERANCE)
    loaded.save_pretrained(tmp_path / "again")
    again = type(_model(name)).from_pretrained(tmp_path / "again")
    assert_close("saved again", expected, _logits(again), TOLERANCE)
    # Saving has made the configuration's dtype a text.
    dense = loaded.dequantize()
    assert_close("dense", expected, _logits(dense), TOLERANCE)
    assert {type(module) for module in dense.modules()} == {type(module) for module in _model(name).modules()}
    dense.save_pretrained(tmp_path / "dense")
    plain = type(_model(name)).from_pretrained(tmp_path / "dense")
    assert_close("dense, loaded", expected, _logits(plain), TOLERANCE)


def test_two_names_of_a_bias_are_one_parameter(tmp_path) -> None:
    loaded = transformers.BertForMaskedLM.from_pretrained(_saved("BertForMaskedLM", tmp_path / "model"))
    for model in (
        loaded,
        lopro_fx.pack_model(_model("BertForMaskedLM"), _state("BertForMaskedLM", 8), activations="float"),
    ):
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
        model.tie_weights()
        assert_close("tied once more", _logits(loaded), _logits(model), TOLERANCE)
        assert model.config.tie_word_embeddings


def _edit(folder: Any, edit: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "bias"),
    [("BertForMaskedLM", "bert.encoder.layer.0.output.dense.bias"), ("GPTJForCausalLM", "lm_head.bias")],
)
def test_a_missing_bias_is_refused(name: str, bias: str, tmp_path) -> None:
    folder = _saved(name, tmp_path / "model")
    _edit(folder, lambda tensors: tensors.pop(bias))
    with pytest.raises(CheckpointError, match=re.escape(f"'{bias}'")):
        type(_model(name)).from_pretrained(folder)


def test_a_folder_that_says_nothing_is_tied_still_loads(tmp_path) -> None:
    """As version 0.1.0 wrote them: the second name of the bias is in no file."""
    folder = _saved("BertForMaskedLM", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    loaded = transformers.BertForMaskedLM.from_pretrained(folder)
    expected = _logits(
        lopro_fx.pack_model(_model("BertForMaskedLM"), _state("BertForMaskedLM", 8), activations="float")
    )
    assert_close("loaded", expected, _logits(loaded), TOLERANCE)


def test_a_head_solved_on_its_own_keeps_the_tie_of_its_bias(tmp_path) -> None:
    name, head = "BertForMaskedLM", "cls.predictions.decoder"
    state = lopro_fx.calibrate(_program(name), None, RTN(bits=3, group_size=32, include=("*", head)))
    assert not state.layers[head].embedding
    with torch.no_grad():
        expected = lopro_fx.apply(_program(name), state).module()(_ids())
    lopro_fx.save_pretrained(_model(name), state, tmp_path / "model", activations="float")
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "model")
    assert isinstance(loaded.bert.embeddings.word_embeddings, nn.Embedding)
    assert_close("loaded", expected, _logits(loaded), TOLERANCE)
    dense = loaded.dequantize()
    assert not dense.config.tie_word_embeddings
    dense.save_pretrained(tmp_path / "dense")
    plain = transformers.BertForMaskedLM.from_pretrained(tmp_path / "dense")
    assert_close("dense", expected, _logits(plain), TOLERANCE)


def test_a_state_that_calls_a_head_by_its_embedding_still_applies() -> None:
    """As version 0.1.0 named it, where the embedding was made last."""
    name, head, table = "XLMRobertaForMaskedLM", "lm_head.decoder", "roberta.embeddings.word_embeddings"
    state = _state(name, 8)
    assert head in state.layers
    inputs = {**state.inputs, table: replace(state.inputs[head], name=table, readers=(table,))}
    layers = {**state.layers, table: replace(state.layers[head], name=table, input=table)}
    old = replace(state, inputs=inputs, layers=layers)
    del inputs[head], layers[head]
    with torch.no_grad():
        expected, got = (lopro_fx.apply(_program(name), each).module()(_ids()) for each in (state, old))
    assert torch.equal(expected, got)
