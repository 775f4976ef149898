"""Packed models whose tensors are kept elsewhere and brought in by accelerate's hooks, and copies of packed models."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lopro_fx
from tests.helpers import assert_close
from tests.huggingface.models import CONFIG, case, token_ids

accelerate = pytest.importorskip("accelerate")
IDS = token_ids(2, 7)


@functools.cache
def _state() -> lopro_fx.QuantState:
    """Groups that share a rotation and a factor, and a head that shares its table."""
    config = lopro_fx.LoPRo(**{**vars(CONFIG), "head_bits": 8})
    return lopro_fx.calibrate(case("tied").program, [token_ids(2, 16)], config)


def _packed(activations: str = "float") -> Any:
    model = copy.deepcopy(case("tied").model)
    return lopro_fx.pack_model(model, _state(), activations=activations)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("offload") / "model"
    lopro_fx.save_pretrained(case("tied").model, _state(), path, activations="float")
    return path


@pytest.fixture(params=["float", "int8"])
def activations(request):
    return request.param


@pytest.mark.parametrize("buffers", [True, False])
def test_weights_on_the_cpu(activations: str, buffers: bool) -> None:
    model, expected = _packed(activations), _logits(_packed(activations))
    model = accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)
    assert (model.model.embed_tokens.scales.device.type == "meta") is buffers
    for _ in range(2):
        assert torch.equal(_logits(model), expected)
    assert (model.model.embed_tokens.scales.device.type == "meta") is buffers
    prompt = IDS[:1]
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **options), _packed(activations).generate(prompt, **options))


@pytest.mark.parametrize("buffers", [True, False])
def test_weights_on_the_disk(tmp_path, buffers: bool) -> None:
    model, expected = _packed(), _logits(_packed())
    model = accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"), offload_buffers=buffers)
    assert torch.equal(_logits(model), expected)


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("away", ["model.embed_tokens", "model.layers.1", "model.layers.0.self_attn.q_proj"])
def test_a_part_on_the_disk(tmp_path, away: str, buffers: bool) -> None:
    model, expected = _packed(), _logits(_packed())
    # Every module that holds tensors has a place, as accelerate asks for.
    places = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    places = {name: "disk" if f"{name}.".startswith(f"{away}.") else place for name, place in places.items()}
    model = accelerate.dispatch_model(
        model, {**places, **_owners(model, away)}, main_device="cpu", offload_dir=str(tmp_path), offload_buffers=buffers
    )
    assert torch.equal(_logits(model), expected)


def _owners(model: Any, away: str) -> dict[str, str]:
    """Places of modules that hold tensors and have children: the Linears that a group is named after."""
    owners = [
        name
        for name, module in model.named_modules()
        if list(module.children()) and [*module.buffers(recurse=False), *module.parameters(recurse=False)]
    ]
    return {name: "disk" if f"{name}.".startswith(f"{away}.") else "cpu" for name in owners}


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("away", ["model.embed_tokens", "model.layers.1", "lm_head", "all"])
def test_a_folder_loaded_with_a_device_map(folder, tmp_path, away: str, buffers: bool) -> None:
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {name: "disk" if away in (name, "all") else "cpu" for name in names}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload", offload_buffers=buffers
    )
    expected = _logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(_logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


def test_an_automatic_device_map(folder, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": 12_000}, offload_folder=tmp_path, offload_buffers=True
    )
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(_logits(model), _logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_what_was_not_brought_back_is_refused() -> None:
    """Without hooks, nobody moves what lies on meta."""
    for name in ("model.embed_tokens", "model.layers.1.self_attn.q_proj.input", "model.layers.0.mlp.up_proj"):
        model = _packed()
        model.get_submodule(name).to("meta")
        with pytest.raises((ValueError, RuntimeError), match="device"):
            _logits(model)


def test_copies_compute_the_same() -> None:
    model = _packed()
    expected = _logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.lm_head.table is twin.model.embed_tokens
        assert twin.model.layers[0].self_attn.k_proj.shared is twin.model.layers[0].self_attn.q_proj.input
        assert torch.equal(_logits(twin), expected)
    assert torch.equal(_logits(model), expected)


def test_memory_for_a_model_without_data() -> None:
    model = _packed()
    expected, state = _logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotary = copy.deepcopy(model.model.rotary_emb)
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    model.model.rotary_emb = rotary  # its buffers stand in no state dict
    assert model.lm_head.table.scales.dtype == torch.float16
    assert_close("logits", expected, _logits(model), 1e-6)
