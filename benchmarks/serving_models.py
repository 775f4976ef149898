"""The two models of the serving benchmark: SmolLM2-135M, and a random one of the shape of Llama-3.2-1B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lopro_fx.models.load import load_model
from lopro_fx.models.smollm2 import cache_dir

MODELS = ("smollm2", "wide")


def build(name: str) -> Any:
    """The transformers model `smollm2` or `wide` in float32, in eval mode; the same weights at every call."""
    if name == "smollm2":
        return load_model("smollm2-135m", torch.float32).model
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


def folder(name: str, work: str | None) -> Path:
    """Where the files of a model lie: below `work`, by default in lopro_fx's cache."""
    return (Path(work) if work else cache_dir() / "serving") / name
