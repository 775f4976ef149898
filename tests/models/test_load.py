from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lopro_fx.errors import ModelError
from lopro_fx.models import load_model


@pytest.fixture
def folder(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path)
    return tmp_path


def test_folder(folder, llama, capfd):
    loaded = load_model(str(folder), torch.float32)
    assert not loaded.model.training
    assert loaded.name == str(folder)
    assert str(folder) in loaded.source
    assert loaded.tokenizer("a b c")["input_ids"] == [0, 1, 2]
    expected = llama.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_dtype(folder):
    loaded = load_model(str(folder), torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
     (torch.float64, torch.float32)],
)  # fmt: skip
def test_dtype_as_stored(llama, folder, stored, expected):
    copy.deepcopy(llama).to(stored).save_pretrained(folder)
    loaded = load_model(str(folder), torch.float32)
    assert loaded.stored == expected
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.file_bytes == sum(path.stat().st_size for path in folder.iterdir())


def _refused(name: str, *parts: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(name, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    for part in (name, *parts):
        assert part in message


def test_folder_without_config(tmp_path):
    _refused(str(tmp_path), "config.json")


def test_folder_without_tokenizer(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    _refused(str(tmp_path), "tokenizer")


def test_missing_weight_is_not_made_up(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    _refused(str(folder), "model.layers.0.mlp.up_proj.weight")


def test_damaged_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    _refused(str(folder))


@pytest.mark.parametrize("name", ["no-such-model", "no-such-owner/no-such-model", "./no/such/folder", "what's this?"])
def test_unknown_name(name):
    _refused(name, "smollm2-135m")


@pytest.mark.parametrize(("name", "extra"), [("smollm2-135m", "demo"), ("owner/name", "hf")])
def test_without_transformers_the_error_says_what_to_install(name, extra):
    code = (
        "import sys, torch; sys.modules['transformers'] = None\n"
        "from lopro_fx.models import load_model\n"
        f"load_model({name!r}, torch.float32)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert "ModelError" in last
    assert f"pip install 'lopro_fx[{extra}]'" in last
