"""Tiny random models of transformers, what was calibrated on them, and the same weights unpacked."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import lopro_fx
from lopro_fx.layer import dense_weight
from lopro_fx.models import export_causal_lm
from tests.helpers import generator

VOCAB = 97
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Larger than by default, so that logits differ enough for greedy tokens not to hang on a rounding.
    "initializer_range": 0.3,
}
CONFIG = lopro_fx.LoPRo(
    bits=3, group_size=32, rank=2, transforms="partial", salient=16, refits=0, sweeps=0, clip_steps=2
)


@dataclass(frozen=True)
class Case:
    """A model in float, its program, what was calibrated on it, and the program with it applied."""

    model: Any
    program: ExportedProgram
    state: lopro_fx.QuantState
    quantized: ExportedProgram


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=generator(seed))


@functools.cache
def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """ "tied" is a Llama whose head shares the embedding, "biased" a Qwen2 whose doesn't; not to be changed."""
    torch.manual_seed(0)
    if name == "tied":
        model: Any = LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=False))
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    model = model.to(dtype).eval()
    program = export_causal_lm(model)
    state = lopro_fx.calibrate(program, [token_ids(2, 16)], CONFIG)
    return Case(model, program, state, lopro_fx.apply(program, state))


def fake_quantised(chosen: Case) -> Any:
    """A plain transformers model with the weights that the packed ones stand for."""
    model = type(chosen.model)(chosen.model.config).to(chosen.model.dtype).eval()
    model.load_state_dict(chosen.model.state_dict())
    with torch.no_grad():
        for name, site in chosen.state.layers.items():
            model.get_submodule(name).weight.copy_(dense_weight(chosen.state.inputs[site.input], site))
    return model
