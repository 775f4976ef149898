"""A folder that can't be loaded says why; nothing is filled with random weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lopro_fx
from lopro_fx.errors import CheckpointError, ConfigError, ModelError
from tests.huggingface.models import case


@pytest.fixture
def copied(tied_folder, tmp_path):
    return shutil.copytree(tied_folder, tmp_path / "copy")


def _edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def _edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_truncated_file(copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("key", ["q_proj.scales", "q_proj.input.signs", "k_proj.up"])
def test_missing_tensor(copied, key):
    _edit_weights(copied, lambda tensors: tensors.pop(f"model.layers.1.self_attn.{key}"))
    with pytest.raises(CheckpointError, match=rf"'model\.layers\.1\.self_attn\.{re.escape(key)}'"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_tensor_of_another_dtype(copied):
    name = "model.layers.0.mlp.up_proj.zeros"
    _edit_weights(copied, lambda tensors: tensors.update({name: tensors[name].long()}))
    with pytest.raises(CheckpointError, match=rf"'{re.escape(name)}'.*torch\.int64.*torch\.int32"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_missing_shard(tmp_path):
    copied = tmp_path / "copy"
    lopro_fx.save_pretrained(case("tied").model, case("tied").state, copied, max_shard_size="8KB")
    shard = sorted(copied.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=re.escape(shard.name)):
        AutoModelForCausalLM.from_pretrained(copied)


def test_format_of_another_version(copied):
    _edit_config(copied, lambda config: config.update(format=3, lopro_fx="9.0"))
    with pytest.raises(CheckpointError, match=r"version 3\b.*version 1 and 2\b.*9\.0"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_damaged_description(copied):
    _edit_config(copied, lambda config: config["inputs"].pop("model.layers.0.self_attn.q_proj"))
    with pytest.raises(CheckpointError, match="quantization_config"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_description_of_another_model(copied):
    def rename(config):
        config["layers"]["model.layers.7.mlp.up_proj"] = config["layers"].pop("model.layers.1.mlp.up_proj")

    _edit_config(copied, rename)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*'model\.layers\.7\.mlp\.up_proj'"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_unknown_activations(tied_folder):
    with pytest.raises(ConfigError, match=r"activations='int4'.*int8, float"):
        lopro_fx.LoProConfig(activations="int4")
    with pytest.raises(ConfigError, match="activations='int4'"):
        lopro_fx.pack_model(case("tied").model, case("tied").state, activations="int4")


def test_transformers_that_is_too_old(tied_folder, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.2.1")
    with pytest.raises(ModelError, match=r"transformers 5\.17\b.*5\.2\.1.*pip install"):
        AutoModelForCausalLM.from_pretrained(tied_folder)
    with pytest.raises(ModelError, match=r"LoProQuantizer.*transformers 5\.23\b.*5\.2\.1"):
        _ = lopro_fx.LoProQuantizer


def test_no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"transformers 5\.17\b.*pip install 'lopro_fx\[hf\]'"):
        lopro_fx.pack_model(case("tied").model, case("tied").state)
    with pytest.raises(ModelError, match=r"LoProQuantizer.*transformers 5\.23\b"):
        _ = lopro_fx.LoProQuantizer


def test_without_lopro_fx_transformers_refuses_the_folder(tied_folder):
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tied_folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "got lopro_fx" in done.stdout + done.stderr
    assert "ignore_mismatched_sizes" in done.stderr.splitlines()[-1]


def test_module_that_is_no_linear_is_named():
    class Router(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    chosen = case("tied")
    packed = lopro_fx.pack_model(chosen.model, chosen.state).dequantize(torch.float32)
    packed.model.layers[0].mlp.up_proj = Router(packed.model.layers[0].mlp.up_proj.weight)
    with pytest.warns(UserWarning, match=r"dense.*model\.layers\.0\.mlp\.up_proj"):
        again = lopro_fx.pack_model(packed, chosen.state)
    assert isinstance(again.model.layers[0].mlp.up_proj, Router)


def test_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        lopro_fx.save_pretrained(case("tied").model, case("tied").state, tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_own_folder_is_replaced(copied):
    (copied / "README.md").write_text("mine")
    (copied / "generation_config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"it is now generation_config\.json\.kept"):
        lopro_fx.save_pretrained(case("tied").model, case("tied").state, copied)
    assert (copied / "README.md").read_text() == "mine"
    AutoModelForCausalLM.from_pretrained(copied)
