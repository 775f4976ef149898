"""Tiny random models of every architecture of transformers: one set of rules by the names of sizes, and exceptions."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

VOCAB = 97
_MAPPINGS = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES"}
# Name of a whole setting -> value; the first that matches counts. None leaves it.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id|cls_token_id", 1),
    (r"eos_token_id|sep_token_id|forced_eos_token_id", 2),
    (r".*_token_(id|index)|.*_token_idx", 3),
    (r".*vocab_size(_per_layer_input)?|n_tokens", VOCAB),
    (r"(num|n)_(hidden_|decoder_|encoder_)?layers?|(de|en)coder_layers|num_blocks|depth", 2),
    (r"(mamba_|ssm_|linear_|lightning_)?(num|n)_key_value_heads|n(um)?_kv_heads|num_(global|swa)_key_value_heads", 2),
    (r"multi_query_group_num|swa_num_key_value_heads", 2),
    (r"(num_|n_|(de|en)coder_|swa_num_)?(attention_)?(heads?)|num_attention_heads|n_head|n_heads", 4),
    (r"qk_(nope|rope)_head_dim|v_head_dim|(global_|swa_|attention_)?head_dim|d_kv|rotary_dim", 8),
    (r"qk_head_dim", 16),
    (r"swa_v_head_dim|index_head_dim|attention_head_size|kv_channels", 8),
    (r"(q|kv|o)_lora_rank", 16),
    (r"index_topk", 64),
    (r"index_n_heads", 2),
    (r"(moe_|dense_|shared_|share_)?(expert_)?(intermediate_size|ffn_dim|ffn_hidden_size)(_mlp|_per_layer_input)?", 64),
    (
        r".*(intermediate_size|ffn_dim|ff_dim|ffn_hidden_size)|d_ff|n_inner|dim_ff|d_inner|inner_dim|feed_forward_size",
        64,
    ),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_experts_list", 4),
    (r"num_experts_per_tok(en)?|(moe_)?top_?k(_experts)?|moe_k|num_experts_per_topk", 2),
    (r"n_shared_experts|num_shared_experts|n_group|topk_group|first_k_dense_replace|moe_layer_start_index", 1),
    (
        r"max_(position_embeddings|seq_len(gth)?|sequence_length|target_positions|source_positions)|n_positions|n_ctx",
        128,
    ),
    (r"max_seq_len(gth)?|seq_length|model_max_length|original_max_position_embeddings", 128),
    (r"(sliding_|local_)?(attention_)?window(_size)?|sliding_window(_size)?|local_attention", 8),
    (r"attention_chunk_size|chunk_size", 8),
    (r"block_size|state_size|mamba_d_state|ssm_state_size", 8),
    (r"hidden_size_per_layer_input|.*embedding_size|emb(ed)?_dim|dim|n_embd|d_model", 32),
    (r"word_embed_proj_dim|hidden_dim|.*hidden_size|lru_width|projection_dim|width|d_embed|dim_model|dim_head", 32),
)
# What the rules can't tell, by model type. `type` or `kind:type`.
_EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": "auto", "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCAB, "mask_token_id": 3, "pad_token_id": 1},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 8, "intermediate_size": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": "auto", "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    # Sequences that fit one block of its attention are all that can be exported.
    "minimax": {"block_size": 16},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    # Beyond its window, transformers' own logits with and without a cache differ.
    "moshi": {"sliding_window": 64},
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 16},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 2},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        }
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16, "mamba_ngroups": 1, "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Settings that choose another path through the model: `architecture+name`.
_VARIANTS: dict[str, dict[str, Any]] = {
    "causal:falcon+alibi": {"alibi": True},
    "causal:falcon+heads": {"multi_query": False, "num_kv_heads": 4},
    "causal:falcon+new": {"new_decoder_architecture": True},
    "causal:gpt_bigcode+heads": {"multi_query": False},
    "causal:mpt+clip": {"attn_config": {"clip_qkv": 1.0}},
    "causal:opt+post": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
}
_RECURSE = re.compile(r".*_config$")


def architectures() -> list[str]:
    """`kind:type`, one for each class of model, e.g. `causal:llama`."""
    from transformers.models.auto import modeling_auto

    names = []
    for kind, mapping in _MAPPINGS.items():
        seen: set[str] = set()
        for name, made in getattr(modeling_auto, mapping).items():
            if made not in seen:
                names.append(f"{kind}:{name}")
            seen.add(made)
    return names + list(_VARIANTS)


def tiny_model(architecture: str) -> Any:
    """A model in eval mode with random weights, biases and norms among them, the same in every process."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

    kind, name = architecture.partition("+")[0].split(":")
    extra = {**_EXTRA.get(name, {}), **_VARIANTS.get(architecture, {})}
    config = _shrunk(CONFIG_MAPPING[name], extra)
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM
    model = auto.from_config(config, dtype=torch.float32)
    _randomise(model)
    return model.eval()


def _shrunk(kind: Any, extra: dict[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for name, value in kind().to_dict().items():
        if name in extra or name in ("model_type", "transformers_version", "dtype", "architectures"):
            continue
        new = _value(name, value)
        if new is not value:
            values[name] = new
    if "kv_lora_rank" in values:  # every head has keys of its own
        values["num_key_value_heads"] = 4
    for name, sub in (getattr(kind, "sub_configs", None) or {}).items():
        values[name] = _shrunk_sub(kind, name, sub, extra.get(name, {}))
    plain = {name: value for name, value in extra.items() if name not in values}
    return kind(**values, **plain)


def _shrunk_sub(kind: Any, name: str, sub: Any, extra: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    default = getattr(kind(), name)
    if default is None:
        return None
    made = sub if sub is not AutoConfig else CONFIG_MAPPING[default.model_type]
    return _shrunk(made, extra)


def _value(name: str, value: Any) -> Any:
    if isinstance(value, bool) or _RECURSE.match(name):
        return value
    if name == "layer_types" or (isinstance(value, list) and name.endswith("layer_types")):
        return _kinds(value)
    if isinstance(value, int) or (value is None and (name.endswith("token_id") or name == "head_dim")):
        for pattern, new in _RULES:
            if re.fullmatch(pattern, name):
                return new
    return value


def _kinds(values: list[Any] | None) -> list[Any] | None:
    """Two layers, of different kinds where there are some."""
    if not values:
        return values
    distinct = list(dict.fromkeys(values))
    return (distinct * 2)[:2]


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim >= 2
    }
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape)
        if not tensor.requires_grad:  # sines of positions
            continue
        if id(tensor) in matrices:
            tensor.copy_(noise * (1.5 / max(1, tensor.shape[1:].numel()) ** 0.5))
        elif tensor.ndim >= 3:
            tensor.copy_(noise * (1.5 / max(tensor.shape[1:]) ** 0.5))
        elif not name.endswith(("A_log", "dt_bias")):
            tensor.add_(noise * 0.2)
    for name, tensor in model.named_buffers():
        if name.endswith("bias") and tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape) * 0.2)
