"""Which Linears are found, how they are grouped, and the reason given for each that is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lopro_fx.passes.sites import Selection, find_sites
from tests.programs import WIDTH, Nested, Product, Twice, decoder, export, rows, seeded


@pytest.fixture(scope="module")
def program():
    return decoder(tied=True, bias=True)[1]


def _reasons(selection: Selection) -> dict[str, str]:
    return {item.name: item.reason for item in selection.skipped}


def test_sites_that_read_one_tensor_form_a_group(program) -> None:
    selection = find_sites(program)
    members = [[site.name for site in group.sites] for group in selection.groups]
    block = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert members == [[f"blocks.{i}.{name}" for name in names] for i in range(2) for names in block]
    for group in selection.groups:
        assert group.name == group.sites[0].name
        assert {site.nodes[0].args[0] for site in group.sites} == {group.source}
        assert group.in_features == group.sites[0].in_features


def test_a_site_says_what_it_is(program) -> None:
    sites = {site.name: site for site in find_sites(program).sites}
    down = sites["blocks.1.down"]
    assert (down.weight, down.bias) == ("blocks.1.down.weight", "blocks.1.down.bias")
    assert (down.out_features, down.in_features, down.dtype) == (32, 48, torch.float32)
    assert len(down.nodes) == 1


def test_a_tied_output_projection_is_left(program) -> None:
    left = find_sites(program).skipped
    assert _reasons(find_sites(program)) == {"lm_head": "its weight is tied to an embedding"}
    assert left[0].shape == (50, 32)


def test_an_untied_output_projection_is_left_by_name() -> None:
    _, untied = decoder(tied=False)
    assert "output projection, kept by default" in _reasons(find_sites(untied))["lm_head"]


@pytest.mark.parametrize("tied", [True, False])
def test_naming_the_output_projection_takes_it(tied: bool) -> None:
    selection = find_sites(decoder(tied=tied)[1], include=("*", "lm_head"))
    assert "lm_head" in {site.name for site in selection.sites}
    assert not selection.skipped


def test_include_and_exclude(program) -> None:
    selection = find_sites(program, include=("blocks.0.*",), exclude=("*.down",))
    assert {site.name for site in selection.sites} == {
        f"blocks.0.{name}" for name in ("q", "k", "v", "o", "gate", "up")
    }
    reasons = _reasons(selection)
    assert reasons["blocks.0.down"] == reasons["blocks.1.down"] == "excluded by name"
    assert reasons["blocks.1.q"] == "not in the include patterns"
    assert len(reasons) == 15 - 6


@pytest.mark.parametrize("pattern", ["*", "?*", "l*", "lm_hea?", "lm_[h]ead", "*lm_head", "**"])
def test_no_pattern_takes_the_output_projection_but_its_name(program, pattern: str) -> None:
    selection = find_sites(program, include=(pattern, "blocks.0.q"))
    assert "lm_head" not in {site.name for site in selection.sites}
    assert _reasons(selection)["lm_head"] == "its weight is tied to an embedding"
    assert "lm_head" in {site.name for site in find_sites(program, include=(pattern, "lm_head")).sites}


def test_excluded_members_leave_their_group(program) -> None:
    group = find_sites(program, exclude=("blocks.0.q",)).groups[0]
    assert [site.name for site in group.sites] == ["blocks.0.k", "blocks.0.v"]
    assert group.name == "blocks.0.k"


def test_a_module_used_twice_is_one_site_with_two_nodes() -> None:
    selection = find_sites(export(seeded(Twice()), rows(4)))
    sites = {site.name: site for site in selection.sites}
    assert set(sites) == {"shared", "other"}
    assert len(sites["shared"].nodes) == 2
    assert [[site.name for site in group.sites] for group in selection.groups] == [["shared", "other"]]


def test_a_product_is_listed_before_it_is_written_as_a_linear() -> None:
    selection = find_sites(export(seeded(Product()), rows(4)))
    assert [site.name for site in selection.sites] == ["linear"]
    (left,) = selection.skipped
    assert (left.name, left.target, left.shape) == ("weight", "aten.addmm.default", (WIDTH, WIDTH))
    assert left.reason.startswith("aten.addmm.default is not aten.linear")


class Experts(nn.Module):
    """Groups of experts chosen by biased scores, as DeepSeek does, and one that a gate of one feature weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.gate = nn.Linear(WIDTH, 8, bias=False), nn.Linear(WIDTH, 1)
        self.shared, self.bias = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).float().sigmoid()
        ranked = (scores + self.bias).view(-1, 2, 4)
        best = ranked.topk(2, -1)[0].sum(-1).topk(1, -1)[1]
        weight, _ = ranked.masked_fill(best[..., None] == 0, 0.0).view(-1, 8).topk(2, -1)
        return self.shared(x) * self.gate(x).sigmoid() + weight.sum(-1, keepdim=True)


def test_what_chooses_experts_is_kept() -> None:
    program = export(seeded(Experts()), rows(4))
    selection = find_sites(program)
    assert [site.name for site in selection.sites] == ["shared"]
    reasons = _reasons(selection)
    assert reasons["router"].startswith("it chooses experts, kept by default")
    assert reasons["gate"].startswith("a single output feature saves nothing")
    for narrow in (("?outer", "g*", "shared"), ("[!x]*",)):
        assert _reasons(find_sites(program, include=narrow)) == reasons
    named = find_sites(program, include=("*", "router", "gate"))
    assert {site.name for site in named.sites} == {"shared", "router", "gate"}
    assert _reasons(find_sites(program, heads=True)) == reasons


def test_the_choice_of_a_token_makes_no_router() -> None:
    class Sampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.lm_head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(x + self.body(x)).softmax(-1).topk(4, -1)[1]

    selection = find_sites(export(seeded(Sampled()), rows(4)), heads=True)
    assert [group.name for group in selection.groups] == ["body"]
    assert [group.name for group in selection.heads] == ["lm_head"]


def test_convolutions_and_batched_products_are_listed() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3)
            self.experts = nn.Parameter(torch.ones(4, WIDTH, WIDTH))
            self.mixed = nn.Parameter(torch.ones(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.conv(x)[..., :1].expand(-1, -1, WIDTH), self.experts) @ self.mixed

    reasons = _reasons(find_sites(export(Other(), rows(4, 4))))
    assert set(reasons) == {"conv", "experts", "mixed"}
    assert all("is not aten.linear" in reason for reason in reasons.values())


def test_weights_that_are_no_matrix_of_floats_are_left() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vector = nn.Parameter(torch.ones(WIDTH))
            self.wide = nn.Linear(WIDTH, 4, dtype=torch.float64)
            self.plain = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            made = functional.linear(x, self.plain.weight * 2)
            return functional.linear(x, self.vector) + self.wide(x.double()).sum() + made.sum()

    selection = find_sites(export(Odd(), rows(4)))
    reasons = _reasons(selection)
    assert not selection.sites
    assert reasons["vector"] == "its weight has 1 dimensions"
    assert reasons["wide"] == "its weight is torch.float64; fp32, bf16 and fp16 are quantised"
    assert "its weight is computed in the graph, not a parameter" in reasons.values()


@pytest.mark.parametrize("autocast", [None, True])
def test_linears_of_nested_graphs_are_listed(autocast: bool | None) -> None:
    selection = find_sites(export(seeded(Nested(autocast)), rows(4)))
    assert {site.name for site in selection.sites} == {"first", "last"}
    (left,) = selection.skipped
    assert left.reason.startswith("inside the nested graph of submod_")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_taken(dtype: torch.dtype) -> None:
    module = seeded(Twice()).to(dtype)
    sites = find_sites(export(module, rows(4).to(dtype))).sites
    assert {site.dtype for site in sites} == {dtype}
