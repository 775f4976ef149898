"""`lopro-fx bench`: a quantised folder, compiled and measured for real, and packages that can't be measured."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest
import torch

from lopro_fx.packages.package import FORMAT, VERSION


def _manifest(slots, **entries):
    """A manifest of the right types, of a package whose cache has `slots`."""
    cache = {"batch_size": 1, "max_cache_len": slots, "keys": [], "values": [], "dtype": "float32", "vocabulary": 50}
    entries = {"device": "cpu", "machine": "", "instruction_sets": [], "activations": "float", **entries}
    versions = {"format": FORMAT, "version": VERSION, "lopro_fx": "0.1.0", "torch": "2.13.0"}
    return json.dumps({**versions, "decode_bytes": 9, "cache": cache, **entries})


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler: none is here")
def test_bench_of_a_quantised_folder(run, quantized_folder, tmp_path):
    code, out, err = run("bench", quantized_folder, "--prompt-tokens", "6", "--new-tokens", "4", "--repeats", "3",
                         "--batch-size", "2", "--threads", "1", "--activations", "float",
                         "--json", tmp_path / "bench.json")  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert (result["batch"], result["prompt_tokens"], result["new_tokens"], result["threads"]) == (2, 6, 4, 1)
    assert result["activations"] == "float"
    assert [len(runs) for runs in result["seconds"].values()] == [3, 3, 3]
    prefill, first, decode = (sorted(result["seconds"][name])[1] for name in ("prefill", "first_token", "decode"))
    assert result["prefill_tokens_per_second"] == pytest.approx(2 * 6 / prefill)
    assert result["first_token_seconds"] == first
    assert result["decode_tokens_per_second"] == pytest.approx(2 * 4 / decode)
    # The embedding is the output projection too, so a step reads all there is; optimising may drop what it folds.
    report = json.loads((quantized_folder / "report.json").read_text())
    whole = report["packed_bytes"] + report["kept_bytes"]
    assert 0.95 * whole < result["weight_bytes_per_step"] < 1.05 * whole
    # fp32 keys and values of 2 layers with 2 heads of 16, in two rows, for 6 + 2.5 tokens on average.
    assert result["cache_bytes_per_step"] == 4 * 2 * 2 * 2 * 16 * 2 * 8.5
    moved = (result["weight_bytes_per_step"] + result["cache_bytes_per_step"]) * 4 / decode
    assert result["read_bytes_per_second"] == pytest.approx(moved)
    assert result["share_of_memory_limit"] == pytest.approx(moved / result["memory_limit_bytes_per_second"])
    assert 50e6 < result["rss_before_loading_bytes"] < result["peak_rss_bytes"] < 4e9
    for words in ("prefill of 6", "first token after", "decode of 4", "peak memory", "memory limit", "float"):
        assert words in out
    assert f"{result['peak_rss_bytes']:,}" in out


def _refused(result, *words):
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for word in words:
        assert word in err


def test_errors(run, quantized_folder, tmp_path):
    package = tmp_path / "model.pt2"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("model/extra/lopro_fx.json", _manifest(16))
    _refused(run("bench", package), "32 + 64", "16")
    _refused(run("bench", package, "--batch-size", "2"), "--batch-size", "folder")
    _refused(run("bench", package, "--repeats", "0"), "at least 1")
    _refused(run("bench", tmp_path / "none.pt2"), str(tmp_path / "none.pt2"))
    (tmp_path / "cut.pt2").write_bytes(package.read_bytes()[:50])
    _refused(run("bench", tmp_path / "cut.pt2"), str(tmp_path / "cut.pt2"))
    _refused(run("bench", tmp_path), str(tmp_path))
    folder = shutil.copytree(quantized_folder, tmp_path / "copy")
    (folder / "config.json").unlink()
    _refused(run("bench", folder), "config.json")


def test_error_of_the_process_that_measures(run, tmp_path):
    """What passes the first look and can't be loaded: the child's line comes through."""
    package = tmp_path / "model.pt2"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("model/extra/lopro_fx.json", _manifest(99, device="cuda"))
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    _refused(run("bench", package), "cuda", str(package))
