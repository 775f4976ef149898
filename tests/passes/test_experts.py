"""Experts of exported graphs become `lopro::routed_linear`, in whichever form they are spelled, or are reported."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import lopro_fx
from lopro_fx.passes.base import counters
from lopro_fx.passes.experts import ROUTED
from lopro_fx.passes.linears import as_linears
from lopro_fx.passes.sites import find_sites, weight_of
from tests.helpers import generator, relative_rms
from tests.mixtures import EXPERTS, HIDDEN, SLOTS, Mixture, MixtureDecoder
from tests.programs import VOCAB, WIDTH, export, ids, rows, seeded

FORMS = [(form, transposed, bias) for form in ("batched", "grouped") for transposed in (False, True)
         for bias in (False, True)]  # fmt: skip


@pytest.mark.parametrize(("form", "transposed", "bias"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_become_one_node_for_each_weight(form: str, transposed: bool, bias: bool, dtype: torch.dtype) -> None:
    model = seeded(MixtureDecoder(form, transposed, bias)).to(dtype)
    program = export(model, ids(2, 7), dynamic=True)
    counters.clear()
    found = as_linears(program)
    assert counters["experts.routed"] == 2
    assert counters["experts.unsorted"] == (form == "grouped")
    nodes = found.graph.find_nodes(op="call_function", target=ROUTED)
    assert [node.args[3] for node in nodes] == [SLOTS, 1]
    for length in (1, 5, 16):
        x = torch.randint(VOCAB, (2, length), generator=generator(length))
        assert relative_rms(program.module()(x), found.module()(x)) < (1e-6 if dtype == torch.float32 else 1e-2)
    if form == "grouped":
        left = {str(node.target) for node in found.graph.nodes}
        assert not left & {
            "aten.sort.default",
            "aten.histc.default",
            "aten.index_put_.default",
            "aten._grouped_mm.default",
        }
    selection = find_sites(found)
    site, down = (site for site in selection.sites if site.experts)
    assert (site.name, site.shape) == ("experts.gate_up_proj", (EXPERTS, 2 * HIDDEN, WIDTH))
    assert (down.name, down.shape) == ("experts.down_proj", (EXPERTS, WIDTH, HIDDEN))
    original = model.experts.gate_up_proj.detach()
    assert torch.equal(weight_of(found, site), original.mT if transposed else original)
    assert next(item.reason for item in selection.skipped if item.name == "experts.gate").startswith(
        "it chooses experts"
    )


class Ranked(Mixture):
    """Grouped, and each row is multiplied by its place in sorted order, which shows the order."""

    def _gated(self, y: Tensor) -> Tensor:
        places = torch.arange(y.shape[0], device=y.device, dtype=y.dtype)
        return super()._gated(y) * (1 + places.unsqueeze(-1) / 10)


def test_an_order_that_shows_is_kept() -> None:
    model = seeded(Ranked("grouped"))
    program = export(model, rows(6))
    counters.clear()
    found = as_linears(program)
    assert counters["experts.routed"] == 2
    assert counters["experts.unsorted"] == 0
    x = torch.randn(6, WIDTH, generator=generator())
    assert relative_rms(program.module()(x), found.module()(x)) < 1e-6


class Dense(nn.Module):
    """Every expert on every token, as Llama 4 computes them, and a table of three dimensions that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.table = nn.Parameter(torch.randn(3, WIDTH, WIDTH)), nn.Parameter(torch.randn(3, 4, WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.linear(x).expand(3, -1, -1) + self.table, self.experts).sum(0)


def test_what_looks_like_experts_is_reported_with_its_bytes() -> None:
    program = export(seeded(Dense()), rows(4))
    skipped = {item.name: item for item in find_sites(program).skipped}
    assert "bmm" in skipped["experts"].reason
    assert skipped["experts"].lost
    assert skipped["table"].reason.startswith("0.0 MB in 3 dimensions, read by")
    assert skipped["table"].lost
    with pytest.warns(UserWarning, match="'experts', and 1 more is not quantised"):
        lopro_fx.quantize(program, config=lopro_fx.RTN(bits=4, group_size=32))


def test_known_experts_are_quantised_without_a_warning() -> None:
    program = export(seeded(MixtureDecoder()), ids(2, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = lopro_fx.quantize(program, config=lopro_fx.RTN(bits=4, group_size=32))
    lines = {line.name: line.shape for line in lopro_fx.explain(program).taken}
    assert lines["experts.down_proj"] == (EXPERTS, WIDTH, HIDDEN)
    names = {row["name"]: row for row in lopro_fx.report(quantized).rows}
    assert names["experts.gate_up_proj"]["shape"] == [EXPERTS, 2 * HIDDEN, WIDTH]
    assert not [name for name in quantized.state_dict if name.endswith("gate_up_proj")]
