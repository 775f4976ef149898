"""Every error that a user can cause is one line on standard error, exit code 2, and nothing half-done."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lopro_fx
from lopro_fx import cli
from tests.cli.conftest import SMALL


def _refused(result, *words):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"lopro-fx: error: [^\n]+\n", err), err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["COMMAND"]),
        (("quantise",), ["invalid choice", "quantise"]),
        (("quantize", "--bits", "three"), ["--bits", "three"]),
        (("quantize", "--bits", "5"), ["bits=5", "2, 3, 4, 8"]),
        (("quantize", "--group-size", "48"), ["group_size=48", "32, 64, 128, -1"]),
        (("quantize", "--rank", "-1"), ["rank=-1"]),
        (("quantize", "--method", "gptq", "--rank", "8"), ["--rank 8", "gptq"]),
        (("quantize", "--method", "flrq", "--rank", "8"), ["--rank 8", "flrq"]),
        (("quantize", "--method", "lrc", "--rank", "8", "--act-bits", "0"), ["LRC(act_bits=0)"]),
        (("quantize", "--method", "lrq", "--format", "trellis"), ["format='trellis'", "affine"]),
        (("quantize", "--method", "lrq", "--steps", "-1"), ["steps=-1"]),
        (("quantize", "--method", "flrq", "--rank-budget", "-1"), ["FLRQ(rank_budget=-1.0)"]),
        (("quantize", "--budget", "-1"), ["bits_per_weight=-1.0"]),
        (("quantize", "--budget", "3", "--max-bytes", "9"), ["--max-bytes", "not allowed with", "--budget"]),
        (("quantize", "--method", "flrq", "--budget", "3"), ["flrq chooses ranks while it solves"]),
        (("quantize", "--calib-samples", "0"), ["--calib-samples", "at least 1"]),
        (("quantize", "--seq-len", "many"), ["--seq-len", "many"]),
        (("quantize", "--calib", "/nonexistent/text"), ["/nonexistent/text"]),
        (("quantize", "--json", "/nonexistent/result.json"), ["--json", "/nonexistent/result.json"]),
        (("quantize", "/nonexistent/model"), ["/nonexistent/model"]),
        (("generate", "/nonexistent/model", ""), ["prompt"]),
        (("report", "/nonexistent"), ["/nonexistent"]),
        (("export", "/nonexistent", "--aoti", "x.so"), ["x.so", ".pt2"]),
        (("export", "/nonexistent"), ["--aoti"]),
        (("export", "/nonexistent", "--hf", "x", "--cache-bits", "8"), ["--cache-bits", "--package"]),
    ],
)
def test_one_line(run, arguments, words):
    _refused(run(*arguments), *words)


def test_folder_of_someone_else(run, model_folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    _refused(run("quantize", model_folder, *SMALL, "--out", tmp_path / "thesis"), str(tmp_path / "thesis"))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_parent_that_can_not_be_written(run, model_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    _refused(run("quantize", model_folder, *SMALL, "--out", tmp_path / "file" / "out"), str(tmp_path / "file"))


def test_text_that_is_too_short(run, model_folder, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    _refused(run("quantize", model_folder, *SMALL, "--eval", tmp_path / "short.txt"), "32", "window")


def test_journal_of_another_run(run, model_folder, tmp_path):
    journal = tmp_path / "out.partial"
    journal.mkdir()
    (journal / "run.json").write_text('{"fingerprint": "of another"}')
    _refused(run("quantize", model_folder, *SMALL, "--out", tmp_path / "out"), "out.partial", "delete")


def test_nothing_to_quantize(run, model_folder):
    _refused(run("quantize", model_folder, *SMALL, "--exclude", "*"), "nothing to quantise")


def test_damaged_folder(run, quantized_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "copy")
    content = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(content[:-10])
    for command in ("report", "eval"):
        _refused(run(command, folder), "tensors.safetensors", str(folder))


def test_folder_without_a_tokenizer(run, quantized_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "copy")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    _refused(run("generate", folder, "x"), "tokenizer", str(folder))


def test_debug_shows_the_traceback(run):
    code, _, err = run("report", "/nonexistent", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "CheckpointError" in err


def test_our_warnings_are_one_line_and_those_of_libraries_are_not_shown(capsys):
    program = torch.export.export(torch.nn.Linear(32, 32), (torch.ones(1, 32),))
    with cli._quiet(debug=False):
        lopro_fx.quantize(program, None, lopro_fx.GPTQ(bits=4, group_size=32))
        warnings.warn("of a library", stacklevel=1)
        warnings.warn("of a library", FutureWarning, stacklevel=1)
        logging.getLogger("library").warning("of a library")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"lopro-fx: warning: [^\n]*GPTQ[^\n]*data-free[^\n]*\n", captured.err)


def test_help_does_not_load_the_heavy_libraries():
    script = (
        "import sys\nfrom lopro_fx.cli import main\nassert main(['quantize', '--help']) == 0\n"
        "heavy = {'transformers', 'torch._dynamo', 'torch._export.serde.serialize', 'torch._inductor.compile_fx'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--calib-samples" in run.stdout
    assert run.stderr == "[]\n"


@pytest.fixture(scope="module")
def small_table(model_folder, tmp_path_factory):
    """The tokenizer of `model_folder` with a model that knows a quarter of its tokens."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("other") / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, vocab_size=100, num_hidden_layers=1)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("command", ["quantize", "eval", "generate"])
def test_a_tokenizer_of_another_model_is_named_before_the_work(command, small_table, run):
    more = {"quantize": SMALL, "eval": ("--seq-len", "32", "--windows", "2"), "generate": ("the language",)}[command]
    code, out, err = run(command, small_table, *more)
    _refused((code, out.removeprefix("the language"), err), "token id", "100 rows", "tokenizer")
