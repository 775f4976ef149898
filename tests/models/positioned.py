"""Tiny models that choose by the name of the attention, count positions themselves, or have tables of them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from tests.families import VOCAB

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
BART = {
    "vocab_size": VOCAB, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "is_decoder": True, "is_encoder_decoder": False, "init_std": 0.2,
    "decoder_start_token_id": 1,
}  # fmt: skip
_BERT = {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "is_decoder": True}
_GEMMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}


def _falcon(**settings):
    return transformers.FalconForCausalLM(transformers.FalconConfig(**_SIZES, **settings))


def _gemma3():
    """The class that a checkpoint with a vision tower gets; its settings lie in the text's part."""
    text = {**_GEMMA, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    return transformers.Gemma3ForConditionalGeneration(config)


MODELS = {
    # The name of the attention chooses a branch.
    "falcon": lambda: _falcon(multi_query=True),
    "falcon with alibi": lambda: _falcon(alibi=True),
    # The name chooses a class.
    "gpt_neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            **{**_SIZES, "num_layers": 2, "num_heads": 4}, max_position_embeddings=64, window_size=6,
            attention_types=[[["global", "local"], 1]],
        )
    ),
    # Masks that are added to scores.
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_GEMMA, sliding_window=6)),
    "gemma3": _gemma3,
    # Positions are counted from the cache.
    "bart": lambda: transformers.BartForCausalLM(transformers.BartConfig(**BART)),
    "marian": lambda: transformers.MarianForCausalLM(transformers.MarianConfig(**BART, pad_token_id=0)),
    # Positions begin at 2.
    "roberta": lambda: transformers.RobertaForCausalLM(transformers.RobertaConfig(**_BERT)),
    "bert": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**_BERT)),
}  # fmt: skip


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()
