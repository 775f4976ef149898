"""`lopro-fx bench` on a real package, which needs a C++ compiler."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lopro_fx
from lopro_fx.models.generation import export_for_generation

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler, which is absent"
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    lopro_fx.package(export_for_generation(LlamaForCausalLM(config).eval(), max_cache_len=16, batch_size=2), path)
    return path


def test_bench(run, package, tmp_path):
    code, out, err = run("bench", package, "--prompt-tokens", "6", "--new-tokens", "4", "--repeats", "3",
                         "--threads", "1", "--json", tmp_path / "bench.json")  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["batch"], result["prompt_tokens"], result["new_tokens"], result["threads"]) == (2, 6, 4, 1)
    assert [len(runs) for runs in result["seconds"].values()] == [3, 3, 3]
    prefill, first, decode = (sorted(result["seconds"][name])[1] for name in ("prefill", "first_token", "decode"))
    assert result["prefill_tokens_per_second"] == pytest.approx(2 * 6 / prefill)
    assert result["first_token_seconds"] == first
    assert result["decode_tokens_per_second"] == pytest.approx(2 * 4 / decode)
    # The embedding is the head too; keys and values of 2 heads of 16, in two rows, for 6 + 2.5 tokens on average.
    weights = 4 * (400 * 64 + 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64 + 64)
    assert weights <= result["weight_bytes_per_step"] <= weights + 1024
    assert result["cache_bytes_per_step"] == 4 * 2 * 2 * 16 * 2 * 8.5
    moved = (result["weight_bytes_per_step"] + result["cache_bytes_per_step"]) * 4 / decode
    assert result["read_bytes_per_second"] == pytest.approx(moved)
    assert result["share_of_memory_limit"] == pytest.approx(moved / result["memory_limit_bytes_per_second"])
    assert 50e6 < result["rss_before_loading_bytes"] < result["peak_rss_bytes"] < 4e9
    for words in ("prefill of 6", "first token after", "decode of 4", "peak memory", "memory limit"):
        assert words in out
    assert f"{result['peak_rss_bytes']:,}" in out


def test_bench_of_a_quantised_folder(run, quantized_folder, tmp_path):
    code, out, err = run("bench", quantized_folder, "--prompt-tokens", "3", "--new-tokens", "2", "--repeats", "1",
                         "--activations", "float", "--json", tmp_path / "bench.json")  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["batch"], result["activations"], len(result["seconds"]["decode"])) == (1, "float", 1)
    report = json.loads((quantized_folder / "report.json").read_text())
    # The embedding is the output projection too, so a step reads all there is; optimising may drop what it folds.
    whole = report["packed_bytes"] + report["kept_bytes"]
    assert 0.95 * whole < result["weight_bytes_per_step"] < 1.05 * whole
    assert str(quantized_folder) in out


def _refused(result, *words):
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1)
    for word in words:
        assert word in err


def test_errors(run, package, tmp_path):
    _refused(run("bench", package), "32 + 64 tokens", "cache of 16")
    _refused(run("bench", tmp_path / "none.pt2"), "no such file")
    _refused(run("bench", tmp_path), "was not written by lopro_fx")
    _refused(run("bench", package, "--batch-size", "2"), "--batch-size", "folder")
    _refused(run("bench", package, "--repeats", "0"), "at least 1")
    content = package.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(content[: len(content) // 2])
    _refused(run("bench", tmp_path / "cut.pt2"), "truncated")
