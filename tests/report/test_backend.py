"""`backend_report`: figures that add up by hand, for every way that the kernels are chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the names are those of Triton kernels")

import lopro_fx
from lopro_fx import ConfigError, GraphError
from lopro_fx.cli import main
from tests.helpers import generator
from tests.mixtures import EXPERTS, HIDDEN, SLOTS, MixtureDecoder
from tests.passes.packs import trellis
from tests.passes.quantised import quantised, rewritten
from tests.programs import VOCAB, WIDTH, Block, decoder, export, ids, rows, seeded

BUFFERS = ("codes", "scales", "zeros", "up", "up_scale", "down", "down_scale", "scale", "perm", "signs")
# Multiply-adds of seven Linears and their rank-2 branches; additions of Hadamard blocks of 32, and of 16 in 48 columns.
PRODUCTS = 4 * 32 * 32 + 3 * 32 * 48
LOW_RANK = 2 * (5 * 32 + 2 * 48) + 2 * (3 * 32 + 48)
FLOPS = 2 * (PRODUCTS + LOW_RANK) + 3 * 32 * 5 + 48 * 4
DENSE = ["dequantize_device", "addmm", "aten", "mm", "aten"]


@pytest.fixture(scope="module")
def plain():
    return quantised("full")


@pytest.fixture(scope="module")
def optimized(plain):
    return lopro_fx.optimize(plain)


@pytest.fixture(scope="module")
def strings():
    return lopro_fx.optimize(rewritten(seeded(Block()), rows(2, 9), dynamic=True, weight=trellis))


def row(report: lopro_fx.BackendReport, operator: str, layer: str) -> dict[str, Any]:
    (found,) = (row for row in report.rows if row["operator"] == operator and layer in row["layers"])
    return found


def weights(report: lopro_fx.BackendReport) -> int:
    return sum(size for row in report.rows for name, size in row["read"].items() if name in BUFFERS)


def test_one_token_before_optimisation(plain) -> None:
    report = lopro_fx.backend_report(plain)
    assert [row["operator"] for row in report.rows[:5]] == ["rotate", "project", *["packed_linear"] * 3]
    assert report.totals["launches"] == 4 * 1 + 4 * 2 + 7 * 2
    assert report.totals["flops"] == FLOPS
    assert weights(report) == lopro_fx.report(plain).packed_bytes

    rotate = row(report, "rotate", "blocks.0.q")
    assert (rotate["kernels"], rotate["shape"], rotate["bits"], rotate["flops"]) == (["rotate_device"], [32], "", 160)
    assert (rotate["read"], rotate["written"]) == ({"x": 128, "signs": 4}, {"output": 128})

    project = row(report, "project", "blocks.0.q")
    assert (project["kernels"], project["shape"], project["flops"]) == (["aten", "mm"], [2, 32], 128)
    # The factor is written out in fp32 and read again.
    assert project["read"] == {"down": 64, "scale": 4, "x": 128, "intermediate": 256}
    assert project["written"] == {"intermediate": 256, "output": 8}

    packed = row(report, "packed_linear", "blocks.0.gate")
    assert packed["kernels"] == ["decode_prepare", "decode_product"]
    assert (packed["shape"], packed["bits"], packed["flops"]) == ([48, 32], 3, 2 * 48 * (32 + 2))
    # 32 columns of 16-bit fixed point, and a step and a sum in fp32.
    assert packed["written"] == {"intermediate": 64 + 8, "output": 192}
    assert packed["read"] == {"x": 128, "intermediate": 72, "codes": 48 * 12, "scales": 96, "zeros": 24, "bias": 192,
                              "latent": 8, "up": 96, "up_scale": 4}  # fmt: skip
    assert packed["bytes"] == sum(packed["read"].values()) + sum(packed["written"].values())


def test_one_token_after_optimisation(plain, optimized) -> None:
    before, report = lopro_fx.backend_report(plain), lopro_fx.backend_report(optimized)
    assert [row["operator"] for row in report.rows] == ["packed_site"] * 4
    assert all(row["kernels"] == ["decode_prepare", "decode_product"] for row in report.rows)
    assert report.totals["launches"] == 8
    assert report.totals["flops"] == FLOPS
    assert weights(report) == lopro_fx.report(optimized).packed_bytes
    # Activations and their fixed point are read once an input, not once a Linear, and no factor is written out.
    assert 0.6 < report.totals["bytes"] / before.totals["bytes"] < 1

    merged = row(report, "packed_site", "blocks.0.k")
    assert (merged["layers"], merged["shape"]) == (["blocks.0.q", "blocks.0.k", "blocks.0.v"], [96, 32])
    assert merged["written"] == {"intermediate": 64 + 8 + 8, "output": 384}
    assert merged["read"] == {"x": 128, "signs": 4, "down": 64, "intermediate": 80, "codes": 96 * 12, "scales": 192,
                              "zeros": 36, "bias": 384, "down_scale": 4, "up": 192, "up_scale": 12}  # fmt: skip


def test_a_few_tokens(plain, optimized) -> None:
    report = lopro_fx.backend_report(plain, tokens=8)
    packed = row(report, "packed_linear", "blocks.0.gate")
    # Where no rotation writes it so, the activation is reordered on its own.
    assert packed["kernels"] == ["aten", "packed_linear_device"]
    assert packed["read"] == {"x": 1024, "intermediate": 2048, "codes": 48 * 12, "scales": 96, "zeros": 24,
                              "bias": 192, "latent": 64, "up": 96, "up_scale": 4}  # fmt: skip
    assert packed["written"] == {"intermediate": 2048, "output": 8 * 192}
    assert report.totals["flops"] == 8 * FLOPS
    whole = lopro_fx.backend_report(optimized, tokens=8)
    assert all(row["kernels"] == ["rotate_project", "packed_linear_device"] for row in whole.rows)
    assert (report.totals["launches"], whole.totals["launches"]) == (4 * 1 + 4 * 2 + 7 * 2, 4 * 2)
    assert whole.totals["bytes"] < report.totals["bytes"]


def test_many_tokens(plain, optimized) -> None:
    report = lopro_fx.backend_report(plain, tokens=2048)
    packed = row(report, "packed_linear", "blocks.0.gate")
    assert packed["kernels"] == DENSE
    dense, factor, result = 48 * 32 * 4, 48 * 2 * 4, 2048 * 48 * 4
    assert packed["written"] == {"intermediate": dense + factor + 2 * result, "output": result}
    assert packed["read"]["intermediate"] == packed["written"]["intermediate"]
    assert (packed["read"]["x"], packed["read"]["codes"]) == (2048 * 128, 48 * 12)
    whole = lopro_fx.backend_report(optimized, tokens=2048)
    assert all(row["kernels"] == ["rotate_device", "dequantize_device", "addmm"] for row in whole.rows)
    assert report.totals["flops"] == whole.totals["flops"] == 2048 * FLOPS


def test_a_free_number_of_tokens_gets_the_kernels_for_many(plain, optimized) -> None:
    for program in (plain, optimized):
        report, many = (lopro_fx.backend_report(program, tokens=tokens) for tokens in (None, 2048))
        assert [row["kernels"] for row in report.rows] == [row["kernels"] for row in many.rows]
        assert {(row["tokens"], row["free"]) for row in report.rows} == {(1, True)}
        assert report.totals["flops"] == FLOPS
    packed = row(lopro_fx.backend_report(plain, tokens=None), "packed_linear", "blocks.0.gate")
    assert packed["written"] == {"intermediate": 4 * (48 * 32 + 48 * 2 + 2 * 48), "output": 192}


def test_a_fixed_program_has_its_own_number_of_tokens() -> None:
    program = rewritten(seeded(Block()), rows(2, 9))
    report = lopro_fx.backend_report(program, tokens=None)
    assert {(row["tokens"], row["free"]) for row in report.rows} == {(18, False)}
    assert report.rows == lopro_fx.backend_report(program, tokens=18).rows


def test_narrow_activations_are_half_as_wide() -> None:
    program = rewritten(seeded(Block()).to(torch.bfloat16), rows(2, 9).to(torch.bfloat16))
    report = lopro_fx.backend_report(program)
    packed = row(report, "packed_linear", "o")
    # The low-rank branch's activation is widened for the product.
    assert packed["kernels"] == ["decode_prepare", "aten", "decode_product"]
    assert (packed["read"]["x"], packed["read"]["latent"], packed["written"]["output"]) == (64, 2 * 2, 64)


def test_partial_sums_are_written_and_added_up() -> None:
    program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(4096, 32)), (torch.ones(1, 4096),))
    report = lopro_fx.backend_report(lopro_fx.quantize(program, None, lopro_fx.RTN(bits=8)), tokens=2)
    packed = row(report, "packed_linear", "0")
    assert packed["kernels"] == ["aten", "packed_linear_device", "sum"]
    # 4096 columns, reordered, in 8 parts.
    assert packed["written"] == {"intermediate": 2 * 4096 * 4 + 8 * 2 * 32 * 4, "output": 2 * 32 * 4}
    assert packed["read"]["intermediate"] == packed["written"]["intermediate"]


@pytest.mark.parametrize("tokens", [1, 8, 2048, None])
def test_cpu_runs_aten_whatever_the_number_of_tokens(plain, tokens: int | None) -> None:
    report = lopro_fx.backend_report(plain, tokens=tokens, device="cpu")
    packed = row(report, "packed_linear", "blocks.0.gate")
    assert packed["kernels"] == ["aten", *DENSE[1:]]
    assert packed["read"]["codes"] == 48 * 12
    assert packed["written"]["output"] == (tokens or 1) * 192
    assert weights(report) == lopro_fx.report(plain).packed_bytes


def test_json_text_and_the_time_at_the_memory_limit(optimized) -> None:
    report = lopro_fx.backend_report(optimized, bandwidth=4.8e12)
    assert json.loads(report.to_json()) == report.to_dict()
    assert report.totals["microseconds"] == pytest.approx(sum(row["microseconds"] for row in report.rows))
    assert report.rows[0]["microseconds"] == pytest.approx(report.rows[0]["bytes"] / 4.8e6)
    assert report.totals["read"] + report.totals["written"] == report.totals["bytes"]
    text = str(report)
    assert "cuda, tokens 1, at 4,800 GB/s" in text
    assert text.splitlines()[-1].split()[:2] == ["total", "8"]
    assert all(layer in text for row in report.rows for layer in row["layers"])
    without = lopro_fx.backend_report(optimized)
    assert "microseconds" not in str(without)
    assert "microseconds" not in {*without.totals, *without.rows[0]}


def test_nothing_is_changed(plain) -> None:
    code, meta = plain.graph_module.code, str(plain.graph_module.meta)
    ranges = str(plain.range_constraints)
    lopro_fx.backend_report(plain, tokens=None)
    assert (plain.graph_module.code, str(plain.graph_module.meta), str(plain.range_constraints)) == (code, meta, ranges)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"device": "tpu"}, "'tpu'.*cuda, cpu"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0"),
        ({"bandwidth": float("nan")}, "bandwidth is nan"),
    ],
)
def test_values_out_of_range(plain, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lopro_fx.backend_report(plain, **options)


def test_programs_without_packed_layers(plain) -> None:
    with pytest.raises(GraphError, match="not quantised"):
        lopro_fx.backend_report(decoder()[1])
    with pytest.raises(GraphError, match="decomposed"):
        lopro_fx.backend_report(plain.run_decompositions())


def test_command_line(optimized, tmp_path: Path, capsys) -> None:
    folder, result = str(tmp_path / "saved"), tmp_path / "result.json"
    lopro_fx.save(optimized, folder)
    arguments = ["report", folder, "--backend", "cuda", "--bandwidth", "3350", "--json", str(result)]
    assert main(arguments) == 0
    expected = lopro_fx.backend_report(optimized, bandwidth=3.35e12)
    assert capsys.readouterr().out == f"{expected}\n"
    assert json.loads(result.read_text()) == expected.to_dict()
    for tokens, number in (("8", 8), ("program", None)):
        assert main(["report", folder, "--backend", "cpu", "--tokens", tokens]) == 0
        assert capsys.readouterr().out == f"{lopro_fx.backend_report(optimized, tokens=number, device='cpu')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "8"], "--backend"),
        (["--backend", "cuda", "--tokens", "many"], "'many'"),
        (["--backend", "rocm"], "invalid choice: 'rocm'"),
    ],
)
def test_command_line_errors(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [1, 40, None])
def test_a_trellis_program_names_its_kernels(strings, tokens: int | None) -> None:
    report = lopro_fx.backend_report(strings, tokens=tokens)
    site = ["decode_prepare", "trellis_product"]
    linear = site
    if tokens != 1:
        site, linear = ["rotate_device", "trellis_dequantize", "mm"], ["trellis_dequantize", "mm", "aten", "mm", "aten"]
    found = row(report, "trellis_site", "o")
    assert found["kernels"] == site
    # Four bits for each two columns.
    assert (found["read"]["codes"], found["read"]["scales"]) == (32 * 32 * 2 // 8, 2 * 32)
    assert row(report, "trellis_site", "q")["layers"] == ["q", "k", "v"]
    # Twice 48 rows are three strips of 32 and no longer two of 48, so these stay apart.
    assert row(report, "trellis_linear", "gate")["kernels"] == linear


@pytest.fixture(scope="module")
def mixture():
    text = [torch.randint(VOCAB, (4, 16), generator=generator())]
    program = export(seeded(MixtureDecoder()), ids(), dynamic=True)
    return lopro_fx.quantize(program, text, lopro_fx.TileQ(bits=4, group_size=32, tile_rank=4))


@pytest.mark.parametrize(
    ("target", "device", "tokens", "operator", "kernels"),
    [
        ("cuda", "cuda", 1, "packed_experts_site", ["experts_prepare", "packed_experts_product"]),
        (
            "cuda", "cuda", 40, "packed_experts_site",
            ["rotate_device", "aten", "mm", "experts_latents", "aten", "packed_experts_matmul"],
        ),
        (None, "cuda", 1, "packed_experts", ["decode_prepare", "packed_experts_product"]),
        (None, "cpu", 40, "packed_experts", ["packed_experts_loop"]),
        ("cpu", "cpu", 1, "cpu_experts", ["cpu_experts"]),
    ],
)  # fmt: skip
def test_experts(mixture, target: str | None, device: str, tokens: int, operator: str, kernels: list[str]) -> None:
    program = lopro_fx.optimize(mixture, target=target) if target else mixture
    report = lopro_fx.backend_report(program, tokens=tokens, device=device)
    found = row(report, operator, "experts.gate_up_proj")
    assert found["kernels"] == kernels
    assert found["shape"] == [2 * HIDDEN, WIDTH]
    # Of five experts, the two of one token are read.
    read = min(EXPERTS, tokens * SLOTS)
    assert found["read"]["codes"] == read * 2 * HIDDEN * WIDTH // 2
    assert found["read"]["scales"] == read * 2 * HIDDEN * 2
    assert found["flops"] >= 2 * tokens * SLOTS * 2 * HIDDEN * (WIDTH + 4)
