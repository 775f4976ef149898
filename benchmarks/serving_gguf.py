"""Writes a transformers Llama or Mixtral as a float32 GGUF or with random codes, and says what a GGUF holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

# Names of transformers and of llama.cpp.
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = {**LINEARS, "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}

_ROUTER = "ffn_gate_inp"
# Number of a type, bytes of a row's fp32 scale and of a block, the place of its fp16 scale, and its weights. The last
# two are ik_llama.cpp's.
_TYPES = {
    "Q4_0": (2, 0, 18, 0, 32),
    "IQ2_XXS": (16, 0, 66, 0, 256),
    "IQ3_XXS": (18, 0, 98, 0, 256),
    "IQ2_KT": (153, 4, 68, None, 256),
    "IQ3_KT": (154, 4, 100, None, 256),
}


def write_gguf(model: Any, path: Path) -> None:
    """Writes `model` (LlamaForCausalLM or MixtralForCausalLM, tied embeddings) to `path`, without a tokenizer: the
    benchmark gives ids."""
    writer = _writer(model.config, path)
    _add(writer, "token_embd", model.model.embed_tokens.weight)
    _add(writer, "output_norm", model.model.norm.weight)
    for index, layer in enumerate(model.model.layers):
        for short, weight in _weights(layer):
            if short in ("attn_q", "attn_k"):
                weight = _interleaved(weight, _head_size(model.config))
            _add(writer, f"blk.{index}.{short}", weight)
    _write(writer)


def write_random(model: Any, path: Path, kind: str) -> None:
    """Writes random weights of the shapes of `model` to `path`: Linears of the type `kind`, the rest as Q8_0 or fp32.

    For timings of types whose quantisers need an importance matrix: every bit pattern but those of the scales is one of
    their weights.
    """
    rng = np.random.default_rng(0)
    writer = _writer(model.config, path)
    table = model.model.embed_tokens.weight.detach().numpy()
    writer.add_tensor("token_embd.weight", gguf.quantize(table, gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    _add(writer, "output_norm", model.model.norm.weight)
    for index, layer in enumerate(model.model.layers):
        for short, weight in _weights(layer):
            if weight.dim() == 1 or short == _ROUTER:
                _add(writer, f"blk.{index}.{short}", weight)
            else:
                _add_random(writer, f"blk.{index}.{short}.weight", tuple(weight.shape), kind, rng)
    _write(writer)


def _weights(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """Names of llama.cpp and weights of a decoder's layer; those of experts are (experts, rows, columns)."""
    experts = getattr(layer.mlp, "experts", None)
    for name, short in _LAYER.items():
        if experts is None or not name.startswith("mlp."):
            yield short, layer.get_submodule(name).weight
    if experts is not None:
        gate, up = experts.gate_up_proj.chunk(2, 1)
        yield _ROUTER, layer.mlp.gate.weight
        yield "ffn_gate_exps", gate
        yield "ffn_up_exps", up
        yield "ffn_down_exps", experts.down_proj


def _add_random(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str, rng: np.random.Generator
) -> None:
    number, head, size, place, block = _TYPES[kind]
    rows, blocks = math.prod(shape[:-1]), shape[-1] // block
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    if place is not None:
        data[:, :, place : place + 2] = np.full(1, 0.002, np.float16).view(np.uint8)
    data = data.reshape(rows, -1)
    if head:
        data = np.concatenate([np.full((rows, 1), 0.002, np.float32).view(np.uint8), data], 1)
    # As int8, the shape is taken as it is: the writer does not know every type.
    writer.add_tensor_info(name, shape, np.dtype(np.int8), data.nbytes, raw_dtype=number)
    writer.tensors[-1][name].tensor = data


def _writer(config: Any, path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(_head_size(config))
    if experts := getattr(config, "num_local_experts", 0):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    return writer


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write(writer: gguf.GGUFWriter) -> None:
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
