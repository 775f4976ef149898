"""Quantised experts of every family: programs, folders of both kinds, and generation give the same logits."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

import lopro_fx
from lopro_fx.errors import CheckpointError
from lopro_fx.huggingface.products import PackedExperts
from lopro_fx.models import export_causal_lm, rebuild_model
from lopro_fx.models.routed import routed_experts_in
from lopro_fx.state import state_of
from tests.helpers import assert_close, generator
from tests.huggingface.mixtures import OWN_FORM, ROUTED, exported, mixture, rounded, token_ids

IDS, NEW = token_ids(2, 9), 5
# Sums in another order, through a layer that amplifies them.
CLOSE = 5e-6
_LORA = {"bits": 4, "group_size": 32, "refits": 0, "sweeps": 0, "clip_steps": 2}
_SOME = {"exclude": ("*layers.0*experts*", "*layers.1*experts.down_proj")}
METHODS: dict[str, lopro_fx.LoPRo | lopro_fx.GPTQ] = {
    "gptq": lopro_fx.GPTQ(bits=4, group_size=32),
    "lopro": lopro_fx.LoPRo(**_LORA, rank=4),
    "tileq": lopro_fx.TileQ(**_LORA, tile_rank=4),
    "rounded inputs": lopro_fx.LoPRo(**_LORA, rank=4, act_bits=8),
}


@torch.no_grad()
def _logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def _saved(model: Any, state: lopro_fx.QuantState, folder: Path) -> Any:
    lopro_fx.save_pretrained(model, state, folder, activations="float")
    return AutoModelForCausalLM.from_pretrained(folder)


def _stacks(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


def _targets(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("family", ROUTED)
@torch.no_grad()
def test_every_form_computes_the_same(family: str, tmp_path: Path) -> None:
    model, program = exported(family)
    targets = _targets(program)
    assert targets.count("lopro.routed_linear.default") == len(_stacks(model)) == 2
    assert not [name for name in targets if "grouped" in name or name.startswith("aten.bmm")]
    assert_close("program", _logits(model), program.module()(IDS), CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        state = rounded(family)
        quantized = lopro_fx.apply(program, state)
        loaded = _saved(model, state, tmp_path / "hf")
    assert set(_stacks(model)) < state.layers.keys()
    expected = quantized.module()(IDS)
    # transformers' own functions on plain weights.
    dense = lopro_fx.pack_model(model, state).dequantize()
    assert_close("dense", _logits(dense), expected, CLOSE)
    assert_close("folder", expected, _logits(loaded), CLOSE)


# Their attentions differ most from the usual one: complex rotary sines and keys of a latent, sinks in a window.
@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
@torch.no_grad()
def test_a_saved_program_and_generation(family: str, tmp_path: Path) -> None:
    (model, program), state = exported(family), rounded(family)
    quantized = lopro_fx.apply(program, state)
    lopro_fx.save(quantized, tmp_path / "program")
    assert torch.equal(lopro_fx.load(tmp_path / "program").module()(IDS), quantized.module()(IDS))
    programs = lopro_fx.export_for_generation(model, max_cache_len=16, batch_size=2)
    runner = lopro_fx.Generator.from_programs(programs.map(lambda part: lopro_fx.apply(part, state)))
    tokens = [runner.prefill(IDS).argmax(-1, keepdim=True)]
    while len(tokens) < NEW:
        tokens.append(runner.decode(tokens[-1]).argmax(-1, keepdim=True))
    packed = lopro_fx.pack_model(model, state, activations="float")
    made = packed.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(made[:, IDS.shape[1] :], torch.cat(tokens, 1))


def test_llama_4_is_named_and_left_as_it_was(tmp_path: Path) -> None:
    model, program = exported("llama4_text")
    with pytest.warns(UserWarning, match=r"experts\.gate_up_proj', and 1 more is not quantised.*no known form"):
        state = rounded("llama4_text")
    assert set(_stacks(model)) == {name for name, _ in state.skipped if name in _stacks(model)}
    loaded = _saved(model, state, tmp_path / "hf")
    assert_close("folder", lopro_fx.apply(program, state).module()(IDS), _logits(loaded), CLOSE)
    with pytest.raises(lopro_fx.ModelError, match="chunked_attention"):
        lopro_fx.export_for_generation(model, max_cache_len=16)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_method(method: str, tmp_path: Path) -> None:
    model, program = exported(OWN_FORM)
    state = lopro_fx.calibrate(program, [token_ids(8, 32, seed) for seed in range(3)], METHODS[method])
    grids = {name: layer.cells is not None for name, layer in state.layers.items() if layer.experts}
    assert set(grids.values()) == {method == "tileq"}
    assert set(_stacks(model)) == grids.keys()
    quantized = lopro_fx.apply(program, state)
    expected = quantized.module()(IDS)
    # A rounding that hangs on the order of a sum moves a whole step.
    close = 1e-2 if method == "rounded inputs" else CLOSE
    loaded = _saved(model, state, tmp_path / "hf")
    assert_close("folder", expected, _logits(loaded), close)
    assert_close("rounded in the kernel", expected, _logits(lopro_fx.pack_model(model, state)), 5e-2)
    narrow = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16))
    assert_close("bfloat16", expected, narrow.float(), 8e-2)
    again = lopro_fx.pack_model(rebuild_model(quantized, model.config), state_of(quantized), activations="float")
    assert torch.equal(_logits(again), _logits(loaded))


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder of two layers, of which the second has one of its two stacks packed, and the logits of its program."""
    model, program = exported(OWN_FORM, 2)
    state = lopro_fx.calibrate(program, None, lopro_fx.RTN(bits=4, group_size=32, **_SOME))
    path = tmp_path_factory.mktemp("partly") / "hf"
    lopro_fx.save_pretrained(model, state, path, activations="float")
    return path, lopro_fx.apply(program, state).module()(IDS)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "lopro"])
def test_every_implementation_where_some_are_packed(partly: tuple[Path, Tensor], implementation: str) -> None:
    folder, expected = partly
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation)
    assert model.config._experts_implementation == implementation
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedExperts)]
    assert packed == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert_close("loaded so", expected, _logits(model), CLOSE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.set_experts_implementation(implementation)
    assert_close("set later", expected, _logits(model), CLOSE)


def test_copies_and_what_is_saved_again(partly: tuple[Path, Tensor], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(partly[0])
    expected = _logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_logits(twin), expected)
        twin.save_pretrained(tmp_path / "again")
        assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)
    base = AutoModel.from_pretrained(partly[0])
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    plain = copy.deepcopy(model).dequantize()
    assert type(plain.model.layers[1].mlp.experts) is type(plain.model.layers[0].mlp.experts)
    plain.save_pretrained(tmp_path / "plain")
    assert_close("plain", expected, _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), CLOSE)


def test_parts_on_the_disk(partly: tuple[Path, Tensor], tmp_path: Path) -> None:
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {name: "disk" if "layers" in name else "cpu" for name in names}
    model = AutoModelForCausalLM.from_pretrained(partly[0], device_map=places, offload_folder=tmp_path,
                                                 offload_buffers=True)  # fmt: skip
    assert_close("offloaded", partly[1], _logits(model), CLOSE)


def test_a_loaded_model_is_exported_and_compiled(partly: tuple[Path, Tensor]) -> None:
    folder, expected = partly
    model = AutoModelForCausalLM.from_pretrained(folder)
    program = export_causal_lm(model)
    assert _targets(program).count("lopro.routed_linear.default") == 3
    assert_close("exported", expected, program.module()(IDS), CLOSE)
    mixture, x = model.model.layers[1].mlp, torch.randn(2, 9, 32, generator=generator())
    compiled = torch.compile(mixture, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert_close("compiled", mixture(x)[0], compiled(x)[0], CLOSE)


def test_gradients_pass_through_packed_experts(tmp_path: Path) -> None:
    model, program = exported(OWN_FORM)
    state = lopro_fx.calibrate(program, [token_ids(8, 32)], METHODS["tileq"])
    packed = lopro_fx.pack_model(model, state).requires_grad_(False)
    found = []
    for each in (packed, copy.deepcopy(packed).dequantize()):
        x = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=x).logits.square().sum().backward()
        found.append(x.grad)
    assert_close("gradient", found[1], found[0], CLOSE)


def test_a_folder_that_lacks_a_tensor(partly: tuple[Path, Tensor], tmp_path: Path) -> None:
    """The first tensor has the name of the plain weight, so that other readers stop at its shape."""
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for missing in (name, f"{name}.scales"):
        tensors = load_file(partly[0] / "model.safetensors")
        assert tensors.pop(missing).shape[0] == 4
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((partly[0] / "config.json").read_text())
        with pytest.raises(CheckpointError, match=rf"lack the tensor '{missing}'"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    described = json.loads((partly[0] / "config.json").read_text())["quantization_config"]["layers"]
    assert described[name]["shape"] == [4, 128, 32]


def test_experts_of_a_class_with_its_own_forward_are_stored_dense() -> None:
    model, program = exported(OWN_FORM)
    model, kind = copy.deepcopy(model), type(model.model.layers[0].mlp.experts)
    model.model.layers[0].mlp.experts.__class__ = type("Own", (kind,), {"forward": batched_mm_experts_forward})
    with pytest.warns(UserWarning, match=r"2 quantised weights are stored dense.*experts\."):
        packed = lopro_fx.pack_model(model, rounded(OWN_FORM), activations="float")
    assert not [module for module in packed.modules() if isinstance(module, PackedExperts)]
    assert_close("dense", lopro_fx.apply(program, rounded(OWN_FORM)).module()(IDS), _logits(packed), CLOSE)


def test_an_implementation_of_someone_else_is_left() -> None:
    model = mixture("mixtral")
    ALL_EXPERTS_FUNCTIONS.register("theirs", batched_mm_experts_forward)
    for name, inside in (("theirs", "theirs"), ("eager", "lopro")):
        model.set_experts_implementation(name)
        with routed_experts_in(model):
            assert model.config._experts_implementation == inside
        assert model.config._experts_implementation == name
