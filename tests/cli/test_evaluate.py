"""`lopro-fx eval` against an original and on tasks."""

from __future__ import annotations

import json
import math
import shutil
import socket
import sys

import pytest
import torch

import lopro_fx
from lopro_fx.evaluation import divergence, read_task, token_windows, zero_shot
from lopro_fx.models import load_model

_SHORT = ("--windows", "3", "--seq-len", "32")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "sense.jsonl"
    rows = [{"id": i, "ctx": f"Item {i} is", "endings": [" a statement.", " qq"], "label": i % 2} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


def _run(run, tmp_path, *arguments):
    code, out, err = run("eval", *arguments, *_SHORT, "--json", tmp_path / "eval.json")
    assert code == 0, err
    return json.loads((tmp_path / "eval.json").read_text()), out, err


def test_a_folder_is_compared_with_the_model_that_it_was_made_from(run, model_folder, quantized_folder, text, tmp_path):
    figures, out, err = _run(run, tmp_path, quantized_folder, "--text", text)
    assert err == ""
    loaded = load_model(str(model_folder), torch.float32)
    windows = token_windows(loaded.tokenizer, text.read_text(), 32, 3)
    original = lambda ids: loaded.model(ids, use_cache=False).logits  # noqa: E731
    expected = divergence(lopro_fx.load(quantized_folder).module(), original, windows)
    assert 0 < expected.kl_mean < expected.kl_max
    for name, value in figures["divergence"].items():
        assert value == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-6), name
    assert figures["ppl"] == pytest.approx(expected.program.ppl, rel=1e-5)
    assert figures["original"]["ppl"] == pytest.approx(expected.original.ppl, rel=1e-5)
    assert figures["against"] == str(model_folder)
    assert f"{figures['divergence']['kl_mean']:.5f}" in out
    for words in ("original", "same likeliest token", "perplexity ratio", f"{figures['original']['ppl']:.3f}"):
        assert words in out

    alone, out, err = _run(run, tmp_path, quantized_folder, "--text", text, "--alone")
    assert err == ""
    assert not {"divergence", "original", "against"} & alone.keys()
    assert alone["ppl"] == pytest.approx(figures["ppl"], rel=1e-6)
    assert "original" not in out


def test_a_folder_does_not_diverge_from_its_copy(run, quantized_folder, tmp_path):
    """`lopro_fx.save` writes no tokenizer: that of the original serves."""
    lopro_fx.save(lopro_fx.load(quantized_folder), tmp_path / "saved")
    figures, _, err = _run(run, tmp_path, tmp_path / "saved", "--against", quantized_folder)
    assert err == ""
    assert (figures["divergence"]["kl_max"], figures["divergence"]["top1"]) == (0, 1)


@pytest.mark.parametrize(
    "record",
    [
        {"source": "folder /nonexistent/model"},
        {"source": "Hugging Face hub, some/model", "model": "some/model"},
        {"source": 5},
        {"source": "", "model": ["/nonexistent/model"]},
    ],
)
def test_original_that_is_gone(run, quantized_folder, tmp_path, monkeypatch, record):
    """No network is asked for a name that a folder gives."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    folder = shutil.copytree(quantized_folder, tmp_path / "copy")
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, **record}))
    figures, _, err = _run(run, tmp_path, folder)
    assert "divergence" not in figures
    assert "warning" in err
    assert "is not compared with its original" in err
    assert record["source"] != "folder /nonexistent/model" or "/nonexistent/model" in err
    assert "--against" in err


def test_tasks(run, model_folder, quantized_folder, task, tmp_path):
    figures, out, err = _run(run, tmp_path, quantized_folder, "--tasks", task, f"again={task}", "--limit", "5")
    assert err == ""
    assert list(figures["tasks"]) == ["sense", "again"]
    loaded = load_model(str(model_folder), torch.float32)
    programs = {
        "model": lopro_fx.load(quantized_folder).module(),
        "original": lambda ids: loaded.model(ids, use_cache=False).logits,
    }
    for which, program in programs.items():
        expected = zero_shot(program, loaded.tokenizer, read_task(task, 5), branched=False)
        assert expected.items == 5
        for name in ("sense", "again"):
            measured = figures["tasks"][name][which]
            assert (measured["acc"], measured["acc_norm"]) == (expected.acc, expected.acc_norm)
    assert "sense: acc, 5 items" in out


def test_lm_eval(run, model_folder, tmp_path, task):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lopro_fx[eval]'")
    (tmp_path / "tasks").mkdir()
    definition = {
        "task": "local_sense", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(task)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{ctx}}",
        "doc_to_choice": "{{endings}}", "doc_to_target": "label", "target_delimiter": "", "metadata": {"version": 1},
    }  # fmt: skip
    (tmp_path / "tasks" / "sense.yaml").write_text(json.dumps(definition))
    arguments = ("--lm-eval", "local_sense", "--lm-eval-path", tmp_path / "tasks", "--limit", "4", "--tasks", task)
    figures, out, err = _run(run, tmp_path, model_folder, *arguments)
    assert err == ""
    measured = figures["lm_eval"]["model"]["local_sense"]
    assert measured["acc,none"] == figures["tasks"]["sense"]["model"]["acc"]
    assert math.isfinite(measured["acc_stderr,none"])
    assert "lm-eval local_sense: acc,none" in out


def _refused(result, *words):
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1)
    for word in words:
        assert word in err


def test_errors(run, model_folder, quantized_folder, task, tmp_path, monkeypatch):
    _refused(run("eval", model_folder, "--against", model_folder, "--alone"), "not allowed with")
    _refused(run("eval", model_folder, "--tasks", "/nonexistent.jsonl"), "/nonexistent.jsonl")
    _refused(run("eval", model_folder, "--tasks", task, task), "sense", "NAME=FILE")
    _refused(run("eval", model_folder, "--limit", "0"), "--limit", "at least 1")
    _refused(run("eval", quantized_folder, "--against", "/nonexistent/model"), "/nonexistent/model")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lopro_fx.evaluation.harness", raising=False)
    _refused(run("eval", model_folder, "--lm-eval", "piqa"), "--lm-eval piqa", "pip install 'lopro_fx[eval]'")


def test_other_tokens(run, model_folder, quantized_folder, tmp_path):
    """The same vocabulary size and other words: numbers would come out, and mean nothing."""
    other = shutil.copytree(model_folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = list(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = {word: index for index, word in enumerate([words[0], *words[:0:-1]])}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    _refused(run("eval", quantized_folder, *_SHORT, "--against", other), "tokens", str(other))
