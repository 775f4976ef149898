"""Writes a transformers Llama model as a float32 GGUF, and says what a GGUF holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: Any, path: Path) -> None:
    """Writes `model` (LlamaForCausalLM, tied embeddings) to `path`, without a tokenizer: the benchmark gives ids."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    _add(writer, "token_embd", model.model.embed_tokens.weight)
    _add(writer, "output_norm", model.model.norm.weight)
    for index, layer in enumerate(model.model.layers):
        for name, short in _LAYER.items():
            weight = layer.get_submodule(name).weight
            if short in ("attn_q", "attn_k"):
                weight = _interleaved(weight, config.head_dim)
            _add(writer, f"blk.{index}.{short}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, weight: Tensor) -> None:
    writer.add_tensor(f"{name}.weight", weight.detach().numpy())


def _interleaved(weight: Tensor, width: int) -> Tensor:
    """Rows (H * width, K) in the order of llama.cpp's rotary embedding: it turns neighbours, transformers turns row i
    with row i + width / 2."""
    return weight.detach().unflatten(0, (-1, 2, width // 2)).transpose(1, 2).reshape(weight.shape).contiguous()


def contents(path: Path) -> dict[str, Any]:
    """File size, bits per weight in all, and for each kind of tensor the types that it is stored in."""
    tensors = gguf.GGUFReader(path).tensors
    kinds: dict[str, Counter[str]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.name.split(".")[-2], Counter())[tensor.tensor_type.name] += 1
    weights = sum(int(np.prod(tensor.shape)) for tensor in tensors)
    size = path.stat().st_size
    return {
        "bytes": size,
        "bits_per_weight": 8 * size / weights,
        "tensors": {kind: dict(count) for kind, count in kinds.items()},
    }
