"""The models of the serving benchmark: SmolLM2-135M, and random ones: of the shape of Llama-3.2-1B, and a Mixtral."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lopro_fx.models.load import load_model
from lopro_fx.models.smollm2 import cache_dir

MODELS = ("smollm2", "wide", "moe")


def build(name: str) -> Any:
    """The transformers model of that name in float32, in eval mode; the same weights at every call."""
    if name == "smollm2":
        return load_model("smollm2-135m", torch.float32).model
    if name == "moe":
        return _moe()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _moe() -> Any:
    """8 layers of 8 experts, the best two for a token: 0.78 B parameters."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32768,
        hidden_size=1024,
        num_hidden_layers=8,
        intermediate_size=3584,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


def folder(name: str, work: str | None) -> Path:
    """Where the files of a model lie: below `work`, by default in lopro_fx's cache."""
    return (Path(work) if work else cache_dir() / "serving") / name
