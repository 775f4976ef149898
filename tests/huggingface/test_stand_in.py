"""What reads or trains a packed module as if it were the nn.Linear or nn.Embedding that it stands for."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import lopro_fx
from lopro_fx.errors import ModelError
from lopro_fx.layer import dense_weight
from lopro_fx.models.export import export_view
from tests.helpers import TOLERANCE, assert_close, generator
from tests.huggingface.models import CONFIG, case, fake_quantised, token_ids

IDS = token_ids(2, 7)


@functools.cache
def _state() -> lopro_fx.QuantState:
    config = lopro_fx.LoPRo(**{**vars(CONFIG), "head_bits": 8})
    return lopro_fx.calibrate(case("tied").program, [token_ids(2, 16)], config)


def _packed(dtype: torch.dtype = torch.float32) -> Any:
    return lopro_fx.pack_model(copy.deepcopy(case("tied").model), _state(), activations="float").to(dtype)


def _dense(name: str) -> Tensor:
    site = _state().layers[name]
    return dense_weight(_state().inputs[site.input], site)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "lm_head", "model.embed_tokens"])
def test_weight_reads_like_that_of_the_plain_module(name: str, dtype: torch.dtype) -> None:
    module: Any = _packed(dtype).get_submodule(name)
    expected = _dense("lm_head" if "embed" in name else name).to(dtype)
    weight = module.weight
    assert isinstance(module, nn.Embedding if "embed" in name else nn.Linear)
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.dtype, weight.device) == (expected.shape, dtype, torch.device("cpu"))
    assert weight.is_floating_point()
    x = torch.randn(3, expected.shape[1], generator=generator()).to(dtype)
    assert torch.equal(functional.linear(x, weight), functional.linear(x, expected))
    assert torch.equal(weight[3:5].t() * 2, expected[3:5].t() * 2)
    for write in (lambda: weight.mul_(2), lambda: weight.data.add_(1), lambda: setattr(weight, "data", expected),
                  lambda: weight.__setitem__(0, 1.0), lambda: weight.copy_(expected)):  # fmt: skip
        with pytest.raises(ModelError, match=r"dequantize\(\)"):
            write()
    assert not [key for key in module.state_dict() if key.endswith("weight")]


def _seq2seq(name: str) -> Any:
    config = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1,
              "num_heads": 4, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
              "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**config)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("head_bits", [0, 8])
@pytest.mark.parametrize("name", ["T5", "UMT5"])
def test_models_that_ask_a_linear_for_its_dtype(name: str, head_bits: int, tmp_path) -> None:
    model = _seq2seq(name)
    plain = type(model).forward

    def forward(self: Any, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return plain(self, input_ids=input_ids, decoder_input_ids=decoder_input_ids, use_cache=False).logits

    program = export_view(model, forward, (IDS, IDS), {"input_ids": None, "decoder_input_ids": None})
    state = lopro_fx.calibrate(program, None, lopro_fx.RTN(bits=8, group_size=32, head_bits=head_bits))
    expected = lopro_fx.apply(program, state).module()(IDS, IDS)
    lopro_fx.save_pretrained(model, state, tmp_path / "model", activations="float")
    loaded = type(model).from_pretrained(tmp_path / "model")
    for packed in (lopro_fx.pack_model(model, state, activations="float"), loaded):
        got = packed(input_ids=IDS, decoder_input_ids=IDS).logits
        assert_close("logits", expected, got, 1e-5)
    narrow = loaded.to(torch.bfloat16)(input_ids=IDS, decoder_input_ids=IDS).logits
    assert narrow.dtype == torch.bfloat16
    assert_close("bfloat16", expected, narrow, 4 * TOLERANCE[torch.bfloat16])


def test_initialising_weights_leaves_packed_ones_alone() -> None:
    model, expected = _packed(), _packed()(IDS).logits
    for module in model.modules():
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.init_weights()
    assert torch.equal(model(IDS).logits, expected)


def test_dequantising_keeps_the_dtype_of_now() -> None:
    model = _packed(torch.bfloat16)
    model.config.dtype = torch.float32
    expected = model(IDS).logits
    dense = model.dequantize()
    assert {tensor.dtype for tensor in dense.parameters()} == {torch.bfloat16}
    assert_close("logits", expected, dense(IDS).logits, 4 * TOLERANCE[torch.bfloat16])
    wide = _packed(torch.bfloat16).dequantize(torch.float32)
    assert {tensor.dtype for tensor in wide.parameters()} == {torch.float32}


def test_an_embedding_that_changes_its_table_is_refused() -> None:
    model = copy.deepcopy(case("tied").model)
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ModelError, match=r"'model\.embed_tokens'.*max_norm.*head_bits=0"):
        lopro_fx.pack_model(model, _state(), activations="float")


def test_figures_of_a_packed_model() -> None:
    model = _packed(torch.bfloat16)
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    rotary = sum(tensor.nbytes for tensor in model.model.rotary_emb.buffers())
    assert model.get_memory_footprint() == stored + rotary


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_a_packed_head_is_refused_before_anything_is_changed(tied: bool, tmp_path) -> None:
    chosen = case("tied" if tied else "biased")
    state = lopro_fx.calibrate(chosen.program, None, lopro_fx.RTN(bits=8, group_size=32, head_bits=8))
    lopro_fx.save_pretrained(chosen.model, state, tmp_path / "model", activations="float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for model in (lopro_fx.pack_model(copy.deepcopy(chosen.model), state, activations="float"), loaded):
        with pytest.raises(ModelError, match=r"'(lm_head|model\.embed_tokens)'.*quantis"):
            model.resize_token_embeddings(120)
        assert model.get_input_embeddings().num_embeddings == 97
        assert model.config.vocab_size == 97
    dense = loaded.dequantize()
    dense.resize_token_embeddings(120)
    assert dense.get_output_embeddings().out_features == 120


def test_resizing_works_where_the_head_is_not_packed() -> None:
    model = lopro_fx.pack_model(copy.deepcopy(case("tied").model), case("tied").state, activations="float")
    expected = model(IDS).logits
    model.resize_token_embeddings(120)
    assert torch.equal(model(IDS).logits[..., :97], expected)


def _pair() -> tuple[Any, Any]:
    """A packed model and the same weights unpacked."""
    chosen = case("biased")
    return lopro_fx.pack_model(copy.deepcopy(chosen.model), chosen.state, activations="float"), fake_quantised(chosen)


def test_biases_train_alone() -> None:
    """Nothing before the first layer asks for gradients, so only its biases do."""
    packed, twin = _pair()
    gradients = []
    for model in (packed, twin):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        model(IDS, labels=IDS).loss.backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert any("layers.0.self_attn.q_proj" in name for name in gradients[0])
    for name, gradient in gradients[1].items():
        # A key's bias moves all scores of a query alike, which changes nothing.
        if "k_proj" not in name:
            assert_close(name, gradient, gradients[0][name], 2e-5)


@pytest.mark.parametrize("operand", ["scales", "up_scale", "down_scale"])
def test_every_operand_that_asks_for_gradients_is_seen(operand: str) -> None:
    linear = _packed().model.layers[0].mlp.up_proj
    tensor = getattr(linear.shared if operand == "down_scale" else linear, operand)
    tensor.requires_grad_()
    linear(torch.randn(3, 32, generator=generator())).sum().backward()
    assert tensor.grad is not None


def test_low_rank_adapters() -> None:
    peft = pytest.importorskip("peft")
    results = []
    for model in _pair():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        gradients = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_" in name]
        results.append((loss, *gradients))
        assert {parameter.dtype for name, parameter in adapted.named_parameters() if "lora_" in name} == {torch.float32}
    for got, expected in zip(*results, strict=True):
        assert_close("adapter", expected, got, 2e-5)
    with pytest.raises(ModelError, match=r"dequantize\(\)"):
        peft.get_peft_model(_packed(), config).merge_adapter()


def test_hooks_of_a_packed_embedding_see_lookups_alone() -> None:
    """As transformers' own, which make what an embedding returns ask for gradients when adapters are trained."""
    packed: Any = _packed().train()
    seen: list[Any] = []
    packed.get_input_embeddings().register_forward_hook(lambda _module, args, output: seen.append((args, output)))
    packed.gradient_checkpointing_enable()
    packed.enable_input_require_grads()
    ids = token_ids(2, 7)
    packed(ids, labels=ids).loss.backward()
    assert len(seen) == 1
    assert torch.equal(seen[0][0][0], ids)
    assert seen[0][1].requires_grad
