"""Tiny random mixtures of experts of transformers' families."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx.models import export_causal_lm
from tests.helpers import generator

VOCAB = 97
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_OWN_SIZE = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
_LATENT = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    "first_k_dense_replace": 0, "n_routed_experts": 8, "n_shared_experts": 1,
}  # fmt: skip
_CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES, **_LOCAL),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SIZES, **_EXPERTS, moe_intermediate_size=64, shared_expert_intermediate_size=64
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_SIZES, **_EXPERTS, moe_intermediate_size=64, head_dim=8),
    "olmoe": lambda: transformers.OlmoeConfig(**_SIZES, **_EXPERTS),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**{**_SIZES, **_OWN_SIZE, **_LATENT}, q_lora_rank=None),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**_SIZES, **_OWN_SIZE, **_LATENT}, q_lora_rank=16, n_group=2, topk_group=1
    ),
    # Its weights are stored transposed, with biases, and gate and up columns alternate.
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SIZES, **_LOCAL, head_dim=8, sliding_window=8, layer_types=["sliding_attention"]
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**_SIZES, **_LOCAL),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **_SIZES, **_OWN_SIZE, head_dim=8, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=0,
    ),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **_SIZES, moe_intermediate_size=64, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
        moe_layer_start_index=0,
    ),
    # Every expert computes every token, in a product of its own form.
    "llama4_text": lambda: transformers.Llama4TextConfig(
        **_SIZES, head_dim=8, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1,
        attention_chunk_size=32, interleave_moe_layer_step=1,
    ),
}  # fmt: skip
ROUTED = tuple(name for name in _CONFIGS if name != "llama4_text")
# Of the tests that look at one family, the one whose modules differ most from the others.
OWN_FORM = "gpt_oss"


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=generator(seed))


def mixture(name: str, layers: int = 1) -> Any:
    """A new model, with random values where its family starts from zeros."""
    config = _CONFIGS[name]()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * layers
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 3 or not tensor.any():
            nn.init.normal_(tensor, std=0.3)
    return model


@functools.cache
def exported(name: str, layers: int = 1) -> tuple[Any, ExportedProgram]:
    """A model and its program, not to be changed."""
    model = mixture(name, layers)
    return model, export_causal_lm(model)


@functools.cache
def rounded(name: str) -> lopro_fx.QuantState:
    """Its state after rounding to nearest."""
    return lopro_fx.calibrate(exported(name)[1], None, lopro_fx.RTN(bits=4, group_size=32))
