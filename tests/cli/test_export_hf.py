from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopro_fx
from lopro_fx.huggingface.products import PackedLinear
from tests.helpers import TOLERANCE, assert_close


def test_export_writes_a_folder_that_transformers_loads(run, quantized_folder, tmp_path):
    folder = tmp_path / "hf"
    code, out, err = run("export", quantized_folder, "--hf", folder, "--max-shard-size", "40KB",
                         "--activations", "float")  # fmt: skip
    assert (code, err) == (0, "")
    assert "AutoModelForCausalLM.from_pretrained" in out
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 15
    assert model.generation_config.eos_token_id == 0
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the text of a test")["input_ids"]])
    with torch.no_grad():
        expected = lopro_fx.load(quantized_folder).module()(ids)
        assert_close("logits", expected, model(ids).logits, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_folder_without_the_model_s_configuration(run, quantized_folder, tmp_path, name):
    folder = shutil.copytree(quantized_folder, tmp_path / "old")
    (folder / name).unlink()
    code, _, err = run("export", folder, "--hf", tmp_path / "hf")
    assert code == 2
    assert "doesn't say which model it holds" in err
    assert not (tmp_path / "hf").exists()
