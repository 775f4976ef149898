from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lopro_fx.errors import ModelError
from lopro_fx.models import load_model
from tests.helpers import assert_close

gguf = pytest.importorskip("gguf", reason="the extra demo is not installed")

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WORDS = ["<s>", "</s>", "a", "b", "c", "ab", "abc", "Ġ"]
# Columns in whole blocks of Q8_0.
CONFIG = LlamaConfig(vocab_size=len(WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, bos_token_id=0,
                     eos_token_id=1, tie_word_embeddings=True)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def dequantised(model):
    """The model with the weights that Q8_0 leaves of its matrices."""
    twin, kind = copy.deepcopy(model), gguf.GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() == 2:
                stored = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))
    return twin


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    """A GGUF of `model` with matrices in Q8_0 and a byte-pair tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write(model, path, gguf.GGMLQuantizationType.Q8_0)
    return path


def _write(model, path, matrices):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, *[1] * (len(WORDS) - 2)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in _tensors(model):
        values = weight.detach().numpy()
        kind = matrices if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, np.ascontiguousarray(gguf.quants.quantize(values, kind)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model):
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    for name, short in NAMES.items():
        weight = model.model.layers[0].get_submodule(name).weight
        if short in ("attn_q", "attn_k"):
            # llama.cpp's rotary embedding turns neighbouring rows.
            weight = weight.unflatten(0, (-1, 2, CONFIG.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        yield f"blk.0.{short}.weight", weight


def test_weights_and_tokenizer_of_a_gguf(dequantised, path):
    loaded = load_model(str(path), torch.float32)
    for name, tensor in dequantised.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    ids = torch.tensor([[2, 6, 3]])
    with torch.no_grad():
        assert_close("logits", dequantised(ids).logits, loaded.model(ids).logits, 1e-6)
    assert loaded.tokenizer("abca", add_special_tokens=False)["input_ids"] == [6, 2]
    assert loaded.source == f"GGUF {path}, dequantised"
    assert next(load_model(str(path), torch.bfloat16).model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["X.GGUF", "without-suffix", "model v1.5"])
def test_a_gguf_is_known_by_its_content(dequantised, path, tmp_path, name):
    loaded = load_model(str(shutil.copy(path, tmp_path / name)), torch.float32)
    ids = torch.tensor([[2, 6, 3]])
    with torch.no_grad():
        assert_close("logits", dequantised(ids).logits, loaded.model(ids).logits, 1e-6)
    assert loaded.file_bytes == path.stat().st_size


@pytest.fixture(scope="module", params=[".gguf", ".GGUF", ""])
def parts(request, path, tmp_path_factory):
    """What llama.cpp's gguf-split makes of `path`: metadata in the first part, tensors in all of three."""
    folder, reader = tmp_path_factory.mktemp("parts"), gguf.GGUFReader(path)
    names = [folder / f"tiny-{index + 1:05}-of-00003{request.param}" for index in range(3)]
    for index, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "llama")
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", len(names))
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for key, field in reader.fields.items() if index == 0 else ():
            if not key.startswith(("GGUF.", "general.architecture")):
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
        for tensor in reader.tensors[index::3]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names


def test_a_gguf_in_parts_is_that_in_one(path, parts):
    whole = load_model(str(path), torch.float32)
    for given in (parts[0], parts[2]):
        loaded = load_model(str(given), torch.float32)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, loaded.model.state_dict()[name]), name
        assert loaded.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
        assert loaded.file_bytes == sum(part.stat().st_size for part in parts)


def test_a_part_that_is_missing_is_named(parts, tmp_path):
    for part in (parts[0], parts[2]):
        shutil.copy(part, tmp_path)
    with pytest.raises(ModelError, match=re.escape(parts[1].name)):
        load_model(str(tmp_path / parts[0].name), torch.float32)


def test_a_file_that_is_no_gguf(tmp_path):
    for name in ("notes.txt", "fake.gguf"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(ModelError, match=f"{name}.*GGUF"):
            load_model(str(tmp_path / name), torch.float32)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("F16", torch.float16), ("F32", torch.float32), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)
def test_own_type_is_that_of_matrices(model, tmp_path, kind, expected):
    _write(model, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[kind])
    assert load_model(str(tmp_path / "tiny.gguf"), torch.float32).stored == expected


def test_gguf_that_can_not_be_read(path, tmp_path):
    with pytest.raises(ModelError, match=r"absent\.gguf"):
        load_model(str(tmp_path / "absent.gguf"), torch.float32)
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        load_model(str(tmp_path / "cut.gguf"), torch.float32)


def test_gguf_needs_its_package(path):
    hidden = "import sys; sys.modules['gguf'] = None; import torch; from lopro_fx.models import load_model"
    code = f"{hidden}; load_model({str(path)!r}, torch.float32)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModelError" in done.stderr.splitlines()[-1]
    assert "gguf" in done.stderr.splitlines()[-1].replace(str(path), "")
