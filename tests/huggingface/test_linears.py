"""Models whose Linears are modules of their own: FalconLinear (`x @ W.T`) and Conv1D (weights stored transposed)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lopro_fx
from lopro_fx.huggingface.linears import as_linear
from lopro_fx.layer import dense_weight
from lopro_fx.models import export_causal_lm
from tests.families import VOCAB, as_stored, causal_lm
from tests.helpers import assert_close, generator

CONFIG = lopro_fx.LoPRo(bits=4, group_size=32, rank=2, clip_steps=4, refits=0, sweeps=0)


def _ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=generator(seed))


@functools.cache
def _case(name: str) -> tuple[Any, lopro_fx.QuantState, Any]:
    """(model, state, the model with the weights that the state stands for); not to be changed."""
    model: Any = causal_lm(name)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = lopro_fx.calibrate(export_causal_lm(model), [_ids(2, 16)], CONFIG)
    twin: Any = causal_lm(name)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for site in state.layers.values():
            dense = dense_weight(state.inputs[site.input], site)
            twin.get_submodule(site.name).weight.copy_(as_stored(name, site.name, dense))
    return model, state, twin


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_a_folder_gives_the_logits_of_the_dense_weights(name: str, tmp_path) -> None:
    model, state, twin = _case(name)
    assert {site.rpartition(".")[2] for site in state.layers} == {
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    }[name]
    lopro_fx.save_pretrained(model, state, tmp_path / "packed", activations="float")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert_close(name, _logits(twin, _ids(2, 9)), _logits(loaded, _ids(2, 9)), 2e-5)
    with torch.no_grad():
        tokens = [each.generate(_ids(1, 5), max_new_tokens=8, do_sample=False) for each in (twin, loaded)]
    assert torch.equal(*tokens)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    second = transformers.AutoModelForCausalLM.from_pretrained(again)
    assert torch.equal(_logits(second, _ids(2, 9)), _logits(loaded, _ids(2, 9)))
    loaded.dequantize()
    assert_close(f"{name}, dense", _logits(twin, _ids(2, 9)), _logits(loaded, _ids(2, 9)), 2e-5)
    for site in state.layers:
        assert loaded.get_submodule(site).weight.shape == model.get_submodule(site).weight.shape


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_generation_programs_take_the_same_state(name: str) -> None:
    model, state, twin = _case(name)
    programs = lopro_fx.export_for_generation(model, max_cache_len=16)
    programs = programs.map(lambda program: lopro_fx.apply(program, state))
    assert not [fqn for fqn in programs.decode.state_dict if any(fqn == f"{site}.weight" for site in state.layers)]
    generator = lopro_fx.Generator.from_programs(programs)
    ids = _ids(1, 9)
    expected = _logits(twin, ids)
    assert_close("prefill", expected[:, 4], generator.prefill(ids[:, :5]), 2e-5)
    for index in range(5, 9):
        assert_close(f"token {index}", expected[:, index], generator.decode(ids[:, index : index + 1]), 2e-5)


def test_what_computes_more_than_a_linear_is_none() -> None:
    class Spelled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            out = input @ self.weight.T
            return out if self.bias is None else out + self.bias

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Silent(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if self.in_features > 3 else input

    for bias in (True, False):
        module = Spelled(4, 5, bias=bias, device="meta")
        assert as_linear(module) is module
        assert as_linear(Scaled(4, 5, bias=bias)) is None
        assert as_linear(Silent(4, 5, bias=bias)) is None
    assert as_linear(nn.Bilinear(2, 2, 2)) is None
    assert as_linear(nn.Identity()) is None
    conv = transformers.pytorch_utils.Conv1D(5, 4)
    linear = as_linear(conv)
    assert linear is not None
    assert (linear.in_features, linear.out_features) == (4, 5)
    x = torch.randn(2, 3, 4, generator=generator())
    assert_close("Conv1D", conv(x), linear(x), 1e-6)
