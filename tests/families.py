"""Tiny random models of several transformers families, exported with dynamic sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lopro_fx.models import export_causal_lm
from tests.helpers import generator

VOCAB = 97
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**_DECODER, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**_DECODER, "num_hidden_layers": 2},
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    # Its attention takes masks that are added to scores, which are soft-capped first.
    "gemma2": lambda: transformers.Gemma2Config(
        **{**_DECODER, "num_hidden_layers": 2}, head_dim=8, sliding_window=8, attn_logit_softcapping=0.1
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_DECODER, num_local_experts=4),
    "phi3": lambda: transformers.Phi3Config(**_DECODER, sliding_window=8),
    "opt": lambda: transformers.OPTConfig(
        **_COMMON, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32
    ),
    # Its Linears are `addmm`, with weights stored as (in_features, out_features).
    "gpt2": lambda: transformers.GPT2Config(**_COMMON, n_embd=32, n_layer=1, n_head=4),
    # Its Linears are `x @ W.T`.
    "falcon": lambda: transformers.FalconConfig(**_COMMON, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
}
QUANTISED = ("llama", "qwen3", "gemma3", "phi3", "opt", "gpt2", "falcon", "bert", "vit")


@dataclass(frozen=True)
class Family:
    """A program, and `inputs(size, seed)`: its positional inputs with `size` as the size that varies."""

    program: ExportedProgram
    inputs: Callable[[int, int], tuple[Tensor, ...]]


def _ids(size: int, seed: int) -> tuple[Tensor, ...]:
    return (torch.randint(3, VOCAB, (2, size), generator=generator(seed)),)


def _pixels(size: int, seed: int) -> tuple[Tensor, ...]:
    return (torch.randn(size, 3, 16, 16, generator=generator(seed)),)


class _Logits(nn.Module):
    """Plain tensors in and out of a model whose forward returns an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, value: Tensor) -> Tensor:
        return self.model(value).logits


def as_stored(family_name: str, site: str, weight: Tensor) -> Tensor:
    """A Linear's weight (out_features, in_features) as a model of the family holds it."""
    return weight.T if family_name == "gpt2" and site != "lm_head" else weight


def causal_lm(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(_CAUSAL[name]()).to(dtype).eval()


@functools.cache
def family(name: str, dtype: torch.dtype = torch.float32) -> Family:
    """Program shared by all tests, not to be changed."""
    if name in _CAUSAL:
        return Family(export_causal_lm(causal_lm(name, dtype)), _ids)
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(**_COMMON, **_LAYERS)
        model, inputs, shape = (
            transformers.BertForMaskedLM(config),
            _ids,
            {0: Dim("batch"), 1: Dim("sequence", min=2, max=512)},
        )
    else:
        config = transformers.ViTConfig(**_LAYERS, image_size=16, patch_size=4, num_labels=5)
        model, inputs, shape = transformers.ViTForImageClassification(config), _pixels, {0: Dim("batch")}
    with torch.no_grad():
        program = torch.export.export(
            _Logits(model.to(dtype).eval()), inputs(6, 0), dynamic_shapes=({**shape},), strict=False
        )
    return Family(program, inputs)


def batches(chosen: Family, count: int = 3, size: int = 16) -> list[tuple[Tensor, ...]]:
    return [chosen.inputs(size, seed) for seed in range(count)]
