from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

import lopro_fx
from lopro_fx.errors import GraphError
from lopro_fx.huggingface.products import PackedInput, PackedLinear
from lopro_fx.models import rebuild_model
from lopro_fx.state import state_of
from tests.helpers import TOLERANCE, assert_close
from tests.huggingface.models import case, fake_quantised, token_ids


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7)])
def test_logits_are_those_of_the_quantised_program(chosen, loaded, batch, length):
    ids = token_ids(batch, length)
    assert_close("logits", chosen.quantized.module()(ids), loaded(ids).logits, TOLERANCE[torch.float32])


def test_generates_the_tokens_of_the_same_weights_unpacked(chosen, loaded):
    prompt = token_ids(2, 5)
    options = {"max_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = fake_quantised(chosen).generate(prompt, **options)
    assert torch.equal(loaded.generate(prompt, **options), expected)
    assert len(set(expected[0].tolist())) > 4


def test_every_quantised_linear_is_packed_and_its_group_stored_once(chosen, loaded, folder):
    packed = {name for name, module in loaded.named_modules() if isinstance(module, PackedLinear)}
    assert packed == set(chosen.state.layers)
    inputs = [module for module in loaded.modules() if isinstance(module, PackedInput)]
    assert len(inputs) == len(chosen.state.inputs)
    attention = loaded.model.layers[1].self_attn
    assert attention.v_proj.shared is attention.q_proj.input
    stored = _stored(folder)
    assert sum(name.endswith("input.signs") for name in stored) == len(chosen.state.inputs)
    size = sum(stored[f"{name}.{key}"].nbytes for name in chosen.state.layers
               for key in ("weight", "scales", "zeros", "up", "up_scale"))  # fmt: skip
    size += sum(tensor.nbytes for name, tensor in stored.items() if ".input." in name)
    assert size == chosen.state.packed_bytes


def _stored(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_shards_have_an_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["weight_map"].keys() == _stored(folder).keys()


def test_tied_weights_are_stored_once_and_tied_again(chosen, loaded, folder):
    tied = chosen.model.config.tie_word_embeddings
    assert ("lm_head.weight" not in _stored(folder)) == tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_saving_what_was_loaded_loses_nothing_and_repeats(loaded, folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    loaded.save_pretrained(first, max_shard_size="8KB")
    assert (first / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    again = _stored(first)
    assert again.keys() == _stored(folder).keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in _stored(folder).items())
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(second, max_shard_size="8KB")
    for path in first.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name


def test_source_model_is_left_as_it_was(chosen, folder):
    assert type(chosen.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert getattr(chosen.model.config, "quantization_config", None) is None
    packed = lopro_fx.pack_model(chosen.model, chosen.state, activations="float")
    assert packed.model.norm.weight is chosen.model.model.norm.weight


def test_report_and_tokenizer_travel_with_the_model(tied_folder):
    chosen = case("tied")
    report = json.loads((tied_folder / "lopro_fx_report.json").read_text())
    assert {layer["name"]: layer["bits"] for layer in report["layers"]} == dict.fromkeys(chosen.state.layers, 3)
    assert report["config"] == chosen.state.config
    assert report["bits_per_weight"] == chosen.state.bits_per_weight
    assert AutoTokenizer.from_pretrained(tied_folder)("w5 w9")["input_ids"] == [5, 9]


def test_pipeline_generates_text(tied_folder):
    write = pipeline("text-generation", model=str(tied_folder), device="cpu")
    (result,) = write("w5 w9 w7", max_new_tokens=4, do_sample=False)
    assert result["generated_text"].startswith("w5 w9 w7")
    assert len(result["generated_text"].split("w")) == 8


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_leave_the_packed_format_alone(chosen, loaded, folder, dtype):
    ids = token_ids(2, 9)
    narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
    linear = narrow.model.layers[0].self_attn.q_proj
    assert narrow.model.norm.weight.dtype == dtype
    assert linear.scales.dtype == linear.input.down_scale.dtype == torch.float16
    assert_close("logits", loaded(ids).logits, narrow(ids).logits, 4 * TOLERANCE[dtype])
    cast = AutoModelForCausalLM.from_pretrained(folder).to(dtype)
    assert cast.model.layers[0].self_attn.q_proj.scales.dtype == torch.float16
    assert_close("logits", loaded(ids).logits, cast(ids).logits, 4 * TOLERANCE[dtype])


def test_bfloat16_checkpoint_keeps_its_dtype(tmp_path):
    chosen = case("tied", torch.bfloat16)
    lopro_fx.save_pretrained(chosen.model, chosen.state, tmp_path / "model", activations="float")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        ids = token_ids(1, 9)
        assert_close("logits", chosen.quantized.module()(ids), loaded(ids).logits, 2 * TOLERANCE[torch.bfloat16])


def test_compiled_generation_with_a_static_cache(tied_folder):
    model = AutoModelForCausalLM.from_pretrained(tied_folder)
    prompt = token_ids(1, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **options)
    assert model.hf_quantizer.is_compileable
    # Inductor's code is tested with the operators; here the question is whether the model is traced as one graph.
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), expected)


@torch.no_grad()
def test_base_model_of_a_saved_causal_model(loaded, folder):
    ids = token_ids(1, 6)
    base = AutoModel.from_pretrained(folder)
    assert torch.equal(base(ids).last_hidden_state, loaded.model(ids).last_hidden_state)


def test_dequantize_gives_the_dense_model(chosen, folder):
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    expected = fake_quantised(chosen).state_dict()
    assert dense.state_dict().keys() == expected.keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert getattr(dense.config, "quantization_config", None) is None


def test_argument_overrides_the_saved_activations(folder, loaded):
    chosen = AutoModelForCausalLM.from_pretrained(folder, quantization_config=lopro_fx.LoProConfig(activations="int8"))
    assert {module.act_bits for module in chosen.modules() if isinstance(module, PackedLinear)} == {8}
    assert {module.act_bits for module in loaded.modules() if isinstance(module, PackedLinear)} == {0}
    assert chosen.config.quantization_config.layers == loaded.config.quantization_config.layers


def test_output_projection_that_was_quantised_is_no_longer_tied(tmp_path):
    chosen = case("tied")
    config = lopro_fx.RTN(bits=4, group_size=32, include=("*", "lm_head"))
    state = lopro_fx.calibrate(chosen.program, None, config)
    assert "lm_head" in state.layers
    lopro_fx.save_pretrained(chosen.model, state, tmp_path / "model", activations="float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(loaded.lm_head, PackedLinear)
    ids = token_ids(2, 6)
    with torch.no_grad():
        expected = lopro_fx.apply(chosen.program, state).module()(ids)
        assert_close("logits", expected, loaded(ids).logits, TOLERANCE[torch.float32])


@torch.no_grad()
@pytest.mark.parametrize("head_bits", [4, 8])
def test_packed_head_shares_its_codes_with_a_tied_embedding(tmp_path, head_bits):
    chosen = case("tied")
    state = lopro_fx.calibrate(chosen.program, None, lopro_fx.RTN(bits=4, group_size=32, head_bits=head_bits))
    lopro_fx.save_pretrained(chosen.model, state, tmp_path / "model", activations="float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.table is loaded.model.embed_tokens
    assert not [name for name in _stored(tmp_path / "model") if name.startswith("lm_head")]
    ids = token_ids(2, 6)
    expected = lopro_fx.apply(chosen.program, state).module()(ids)
    assert_close("logits", expected, loaded(ids).logits, TOLERANCE[torch.float32])
    base = AutoModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.model(ids).last_hidden_state, base(ids).last_hidden_state)
    assert loaded.to(torch.bfloat16).model.embed_tokens(ids).dtype == torch.bfloat16
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model").dequantize()
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert dense.config.tie_word_embeddings
    assert_close("logits", expected, dense(ids).logits, 4 * TOLERANCE[torch.float32])


@torch.no_grad()
@pytest.mark.parametrize("head_bits", [0, 8])
def test_model_rebuilt_from_a_saved_program(tmp_path, head_bits):
    chosen = case("tied")
    quantized = lopro_fx.quantize(chosen.program, None, lopro_fx.RTN(bits=4, group_size=32, head_bits=head_bits))
    lopro_fx.save(quantized, tmp_path / "program")
    program = lopro_fx.load(tmp_path / "program")
    state = state_of(program)
    assert state.packed_bytes == lopro_fx.report(quantized).packed_bytes
    lopro_fx.save_pretrained(
        rebuild_model(program, chosen.model.config), state, tmp_path / "model", activations="float"
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = token_ids(2, 6)
    assert_close("logits", quantized.module()(ids), loaded(ids).logits, TOLERANCE[torch.float32])


def test_optimised_program_can_not_be_recovered():
    with pytest.raises(GraphError, match="optimi"):
        state_of(lopro_fx.optimize(case("tied").quantized))
    with pytest.raises(GraphError, match="not quantised"):
        state_of(case("tied").program)


def test_gradients_pass_through_packed_linears(loaded):
    ids = token_ids(1, 4)
    embedded = loaded.get_input_embeddings()(ids).detach().requires_grad_()
    loaded(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0
