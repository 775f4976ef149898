from __future__ import annotations

import json
import shutil
import zipfile

import pytest
import torch

import lopro_fx
from lopro_fx.evaluation import builtin_text, token_windows
from lopro_fx.models import export_causal_lm, load_model
from lopro_fx.models.quiet import quiet
from tests.cli.conftest import SMALL
from tests.helpers import assert_close

KEYS = {
    "model", "source", "dtype", "method", "ppl_before", "ppl_after", "bits_per_weight", "weights", "packed_bytes",
    "kept_bytes", "seconds", "quantize_seconds", "peak_rss_bytes", "config", "calibration", "evaluation", "lopro_fx",
    "torch", "bits_per_byte_before", "bits_per_byte_after", "bytes_before", "bytes_after", "device", "budget", "plan",
}  # fmt: skip


def test_quantize_prints_a_table_and_writes_json(run, model_folder, tmp_path):
    code, out, err = run("quantize", model_folder, *SMALL, "--method", "gptq", "--bits", "4", "--group-size", "32",
                         "--head-bits", "0", "--exclude", "*.k_proj", "--json", tmp_path / "result.json")  # fmt: skip
    assert (code, err) == (0, "")
    for words in ("perplexity before", "perplexity after", "bits per weight", "packed bytes", "kept bytes", "seconds"):
        assert words in out
    assert "built-in text" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.keys() == KEYS
    assert (result["method"], result["config"]["bits"], result["config"]["group_size"]) == ("gptq", 4, 32)
    assert result["config"]["exclude"] == ["*.k_proj"]
    assert result["calibration"] == {"text": "built-in text (Python's pydoc topics)", "windows": 8, "seq_len": 32}
    assert 1 < result["ppl_before"] < 1000
    assert 1 < result["ppl_after"] < 1000
    assert result["bits_per_weight"] == 8 * result["packed_bytes"] / result["weights"]
    assert result["weights"] == 2 * (64 * (64 + 32 + 64) + 3 * 64 * 96)
    assert 100e6 < result["peak_rss_bytes"] < 4e9
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"], "something was saved without --out"


def test_a_budget_is_kept(run, model_folder, tmp_path):
    code, out, err = run("quantize", model_folder, *SMALL, "--format", "trellis", "--rank", "0", "--budget", "4.5",
                         "--json", tmp_path / "result.json")  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["budget"] == {"bits_per_weight": 4.5}
    assert 3.5 < result["bits_per_weight"] <= 4.5
    assert len({settings["bits"] for settings in result["config"]["overrides"].values()}) > 1
    assert 0 < result["plan"]["kl"] <= result["plan"]["uniform"]["kl"]
    assert f"predicted KL {result['plan']['kl']:.3g} (bits " in out


def test_quantize_out_is_a_folder_that_the_other_commands_take(run, model_folder, quantized_folder, tmp_path):
    report = json.loads((quantized_folder / "report.json").read_text())
    assert report.keys() == KEYS | {"layers"}
    assert not quantized_folder.with_name("out.partial").exists()

    program = lopro_fx.load(quantized_folder)
    assert lopro_fx.report(program).packed_bytes == report["packed_bytes"]

    code, out, err = run("report", quantized_folder, "--json", tmp_path / "report.json")
    assert (code, err) == (0, "")
    assert out == f"{lopro_fx.report(program)}\n"
    assert json.loads((tmp_path / "report.json").read_text())["packed_bytes"] == report["packed_bytes"]

    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    arguments = ("--text", tmp_path / "text.txt", "--windows", "3", "--seq-len", "32", "--json", tmp_path / "eval.json")
    code, out, err = run("eval", quantized_folder, *arguments)
    assert (code, err) == (0, "")
    evaluation = json.loads((tmp_path / "eval.json").read_text())
    assert evaluation["tokens"] == 3 * 31
    assert f"{evaluation['ppl']:.3f}" in out
    assert f"{evaluation['bits_per_byte']:.4f}" in out

    tokenizer = load_model(str(model_folder), torch.float32).tokenizer
    code, out, err = run("generate", quantized_folder, "The import statement", "--max-new-tokens", "5")
    assert (code, err) == (0, "")
    expected = lopro_fx.generate(program, tokenizer, "The import statement", 5)
    assert out == f"The import statement{expected}\n"


def test_eval_of_a_model_is_the_perplexity_before(run, model_folder, quantized_folder, tmp_path):
    report = json.loads((quantized_folder / "report.json").read_text())
    code, _, err = run(
        "eval", model_folder, "--windows", "3", "--seq-len", "32", "--json", tmp_path / "eval.json", "--debug"
    )
    assert code == 0, err
    assert json.loads((tmp_path / "eval.json").read_text())["ppl"] == pytest.approx(report["ppl_before"], rel=1e-6)


def test_explain_says_what_quantize_takes(run, model_folder):
    code, out, err = run("explain", model_folder, "--exclude", "*.v_proj", "--head-bits", "0")
    assert (code, err) == (0, "")
    assert "12 Linears taken" in out
    assert "excluded by name" in out
    assert "tied to an embedding" in out


def test_include_takes_the_output_projection(run, model_folder):
    code, out, _ = run("explain", model_folder, "--include", "lm_head", "--head-bits", "0")
    assert code == 0
    assert "1 Linears taken" in out


def test_head_bits_take_the_output_projection_and_its_embedding(run, model_folder, tmp_path):
    code, out, err = run("quantize", model_folder, *SMALL, "--method", "rtn", "--out", tmp_path / "out",
                         "--json", tmp_path / "result.json")  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["config"]["head_bits"] == 8
    assert result["weights"] == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96) + 400 * 64
    assert not [name for name in lopro_fx.load(tmp_path / "out").state_dict if name.endswith("embed_tokens.weight")]
    code, out, _ = run("explain", model_folder)
    assert code == 0
    assert "15 Linears taken" in out


def test_export_writes_a_package(run, tmp_path):
    torch.manual_seed(0)
    program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(32, 32)), (torch.ones(1, 32),))
    lopro_fx.save(lopro_fx.quantize(program, None, lopro_fx.RTN(bits=4, group_size=32)), tmp_path / "folder")
    code, out, err = run("export", tmp_path / "folder", "--aoti", tmp_path / "model.pt2")
    assert (code, err) == (0, "")
    assert f"{(tmp_path / 'model.pt2').stat().st_size:,} bytes" in out
    assert zipfile.is_zipfile(tmp_path / "model.pt2")


def test_bfloat16_model(run, model_folder, tmp_path):
    folder = tmp_path / "bf16"
    code, _, err = run("quantize", model_folder, *SMALL, "--dtype", "bfloat16", "--method", "rtn", "--out", folder)
    assert (code, err) == (0, "")
    assert lopro_fx.load(folder).state_dict["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_default_keeps_the_stored_type_and_works_in_float32(run, model_folder, tmp_path, stored):
    """The packed tensors are those of a run in float32, and what is kept has the values of the files, bit by bit."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    model = load_model(str(model_folder), torch.float32).model.to(stored)
    with quiet():
        model.save_pretrained(folder)
    for name, options in (("own", ()), ("wide", ("--dtype", "float32"))):
        files = ("--out", tmp_path / name, "--json", tmp_path / f"{name}.json")
        assert run("quantize", folder, *SMALL, "--method", "gptq", *options, *files)[::2] == (0, "")
    own, wide = (lopro_fx.load(tmp_path / name) for name in ("own", "wide"))
    figures = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("own", "wide")]
    assert figures[0]["dtype"] == str(stored).removeprefix("torch.")
    assert figures[0]["ppl_after"] == figures[1]["ppl_after"]
    for name, tensor in wide.state_dict.items():
        assert torch.equal(own.state_dict[name].to(tensor.dtype), tensor), name
    kept = [tensor.dtype for name, tensor in own.state_dict.items() if name.endswith("norm.weight")]
    assert set(kept) == {stored}
    assert figures[0]["kept_bytes"] < figures[1]["kept_bytes"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert_close("logits", wide.module()(ids), own.module()(ids).float(), 5e-2)
    assert json.loads((tmp_path / "own" / "config.json").read_text())["dtype"] == figures[0]["dtype"]


def test_program_of_the_folder_computes_what_was_measured(model_folder, quantized_folder):
    """Same weights, same settings, through the library: the command adds nothing of its own."""
    loaded = load_model(str(model_folder), torch.float32)
    program = export_causal_lm(loaded.model)
    samples = token_windows(loaded.tokenizer, builtin_text()[0], 32, 8)
    quantized = lopro_fx.quantize(
        program, list(samples.split(1)), lopro_fx.LoPRo(bits=3, rank=4, importance="gradient", head_bits=8)
    )
    with torch.no_grad():
        expected, got = (each.module()(samples[:1]) for each in (quantized, lopro_fx.load(quantized_folder)))
    assert torch.equal(got, expected)
