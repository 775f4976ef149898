"""`explain` and `report`: figures that add up, and text that a person can read."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

import lopro_fx
from lopro_fx import GPTQ, RTN, GraphError, LoPRo
from lopro_fx.layer import stored_bytes
from lopro_fx.state import QuantState, state_of
from tests.passes.packs import packed
from tests.programs import Product, decoder, export, ids, rows, seeded


@pytest.fixture(scope="module")
def quantised():
    return lopro_fx.quantize(decoder(bias=True)[1], [ids()], LoPRo(bits=3, group_size=32, rank=2, clip_steps=4))


def test_figures_add_up(quantised) -> None:
    report = lopro_fx.report(quantised)
    _, program = decoder(bias=True)
    assert report.weights == 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert [row["name"] for row in report.rows] == [line.name for line in lopro_fx.explain(program).taken]
    tied = program.state_dict["embed.weight"]
    assert report.packed_bytes + report.kept_bytes + stored_bytes([tied]) == stored_bytes(quantised.state_dict.values())
    # The codes alone take 3 bits where 32 divides the width, padding takes the rest of 48 up to 64.
    assert 3 < report.bits_per_weight < 9
    assert report.config["method"] == "lopro"


def test_json_and_text_hold_every_layer(quantised) -> None:
    report = lopro_fx.report(quantised)
    value = json.loads(report.to_json())
    assert value["bits_per_weight"] == report.bits_per_weight
    assert [row["name"] for row in value["rows"]] == [row["name"] for row in report.rows]
    text = str(report)
    assert "lopro: 14 layers" in text
    assert all(row["name"] in text for row in report.rows)
    assert "\x1b" not in text


def test_more_bits_weigh_more() -> None:
    _, program = decoder()
    sizes = [lopro_fx.report(lopro_fx.quantize(program, None, RTN(bits=bits))).bits_per_weight for bits in (2, 3, 4, 8)]
    assert sizes == sorted(sizes)


def test_an_unquantised_program_has_no_report() -> None:
    with pytest.raises(GraphError, match="not quantised"):
        lopro_fx.report(decoder()[1])


def test_explain_lists_what_is_taken_and_why_the_rest_is_not() -> None:
    explanation = lopro_fx.explain(export(seeded(Product()), rows(4)), GPTQ(exclude=("weight",)))
    assert [line.name for line in explanation.taken] == ["linear"]
    assert [line.name for line in explanation.skipped] == ["weight"]
    text = str(explanation)
    assert re.search(r"\b1 Linears taken\b.*\b1,024 weights\b.*\b1 skipped\b", text)
    assert "excluded" in text


def test_explain_runs_nothing_and_changes_nothing() -> None:
    _, program = decoder()
    code = program.graph_module.code
    groups = {line.name: line.group for line in lopro_fx.explain(program).taken}
    assert groups["blocks.0.v"] == "blocks.0.q"
    assert groups["blocks.1.up"] == "blocks.1.gate"
    assert program.graph_module.code == code
    assert torch.is_grad_enabled()


def test_a_state_without_rows_is_applied_and_read_back() -> None:
    _, program = decoder()
    groups, sites = packed(program, rank=2)
    bare = {name: replace(site, metrics={}) for name, site in sites.items()}
    applied = lopro_fx.apply(program, QuantState({}, groups, bare))
    state, report = state_of(applied), lopro_fx.report(applied)
    assert report.weights == state.weights == sum(site.out_features * site.in_features for site in sites.values())
    assert report.packed_bytes == state.packed_bytes
    for row in report.rows:
        site = sites[row["name"]]
        assert (row["bits"], row["group_size"], row["rank"]) == (*site.weight.spec.values(), 2)
        assert row["shape"] == [site.out_features, site.in_features]
    assert "quantised: 14 layers" in str(report)
    again = lopro_fx.apply(program, state)
    assert torch.equal(again.module()(ids()), applied.module()(ids()))
