"""The rewrite: the numbers of the dense weights that packed tensors stand for, in a program as whole as before."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from lopro_fx.errors import GraphError
from lopro_fx.layer import dense_weight
from lopro_fx.passes.base import counters
from lopro_fx.passes.record import META
from lopro_fx.passes.rewrite import RewritePass
from lopro_fx.passes.sites import find_sites
from tests.helpers import assert_close
from tests.passes.packs import packed
from tests.programs import WIDTH, Product, Twice, decoder, export, ids, rows, seeded

LINEAR = torch.ops.aten.linear.default
ROTATE, PROJECT, PACKED = (getattr(torch.ops.lopro, name).default for name in ("rotate", "project", "packed_linear"))


def _calls(program: ExportedProgram, target: Any) -> list[torch.fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=target))


def _run(program: ExportedProgram, *args: Any) -> Tensor:
    with torch.no_grad():
        return program.module()(*args)


def _rewritten(program: ExportedProgram, **options: Any) -> tuple[ExportedProgram, dict, dict]:
    groups, sites = packed(program, **options)
    return RewritePass(groups, sites, {"config": {"method": "test"}})(program), groups, sites


def _dense_twin(module: nn.Module, groups: dict, sites: dict) -> nn.Module:
    """The eager model with every packed weight put back as a dense one."""
    for name, site in sites.items():
        owner = module.get_submodule(name) if name else module
        owner.weight = nn.Parameter(dense_weight(groups[site.input], site))
    return module


@pytest.fixture(scope="module")
def case():
    """(module, program, rewritten program, groups, sites)"""
    module, program = decoder(depth=1, tied=True, bias=True)
    return module, program, *_rewritten(program)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_those_of_the_dense_weights(rank: int, rotate: bool, bias: bool) -> None:
    module, program = decoder(depth=1, bias=bias)
    result, groups, sites = _rewritten(program, rank=rank, rotate=rotate)
    twin = _dense_twin(module, groups, sites)
    for batch in (ids(), ids(1, 1), ids(3, 17)):
        assert_close(f"logits {tuple(batch.shape)}", twin(batch), _run(result, batch), 1e-5)


def test_counters_count_what_was_done() -> None:
    _, program = decoder(depth=1)
    before = counters.copy()
    _rewritten(program, rank=2)
    assert counters["rewrite.linear"] - before["rewrite.linear"] == 7
    assert counters["rewrite.rotate"] - before["rewrite.rotate"] == 4
    assert counters["rewrite.project"] - before["rewrite.project"] == 4


def test_one_rotation_and_one_projection_a_group(case) -> None:
    _, program, result, *_ = case
    assert len(_calls(result, ROTATE)) == len(_calls(result, PROJECT)) == 4
    assert len(_calls(result, PACKED)) == 7
    assert len(_calls(result, LINEAR)) == 1  # the output projection
    assert len(_calls(program, LINEAR)) == 8


@pytest.mark.parametrize("rank", [0, 2])
def test_without_rotation_or_rank_nothing_stands_in_for_them(rank: int) -> None:
    result, *_ = _rewritten(decoder(depth=1)[1], rank=rank, rotate=False)
    assert not _calls(result, ROTATE)
    assert len(_calls(result, PROJECT)) == (4 if rank else 0)


def test_the_input_program_is_not_changed() -> None:
    _, program = decoder(depth=1, bias=True)
    code, state, logits = program.graph_module.code, dict(program.state_dict), _run(program, ids())
    specs = str(program.graph_signature)
    _rewritten(program)
    assert program.graph_module.code == code
    assert str(program.graph_signature) == specs
    assert list(program.state_dict) == list(state)
    assert all(program.state_dict[name] is tensor for name, tensor in state.items())
    assert META not in program.graph_module.meta
    assert torch.equal(_run(program, ids()), logits)


def test_new_nodes_keep_the_metadata_of_what_they_replace(case) -> None:
    _, program, result, groups, sites = case
    linears = {site.name: site.nodes[0] for site in find_sites(program).sites}
    for node in _calls(result, PACKED):
        mark, linear = node.meta[META], linears[node.meta[META]["site"]]
        assert mark == {"site": mark["site"], "group": sites[mark["site"]].input}
        assert node.meta["nn_module_stack"] == linear.meta["nn_module_stack"]
        assert node.meta["stack_trace"] == linear.meta["stack_trace"]
        assert node.meta["val"].shape == linear.meta["val"].shape
        assert node.meta["val"].dtype == linear.meta["val"].dtype
    for node in (*_calls(result, ROTATE), *_calls(result, PROJECT)):
        group = node.meta[META]["group"]
        modules = [entry[0] for entry in node.meta["nn_module_stack"].values()]
        # Shared by several modules, it belongs to the one around them all.
        assert modules[-1] == (group if len(groups[group].readers) == 1 else group.rpartition(".")[0])
        assert node.meta["stack_trace"]
    assert result.graph_module.meta[META] == {"config": {"method": "test"}}


def test_weights_go_biases_and_the_embedding_stay(case) -> None:
    _, program, result, *_ = case
    gone = set(program.state_dict) - set(result.state_dict)
    assert gone == {f"{site.name}.weight" for site in find_sites(program).sites}
    assert "blocks.0.q.bias" in result.state_dict
    assert "embed.weight" in result.state_dict
    assert {"blocks.0.q.codes", "blocks.0.q.perm", "blocks.0.q.down", "blocks.0.k.up"} <= set(result.state_dict)
    assert "blocks.0.k.perm" not in result.state_dict


def test_taking_a_tied_projection_keeps_the_embedding() -> None:
    module, program = decoder(depth=1, tied=True)
    result, groups, sites = _rewritten(program, include=("*", "lm_head"))
    assert not _calls(result, LINEAR)
    assert torch.equal(result.state_dict["embed.weight"], module.embed.weight)
    embedding = module.embed.weight.detach().clone()
    twin = _dense_twin(module, groups, sites)
    assert torch.equal(twin.embed.weight, embedding)
    assert_close("logits", twin(ids()), _run(result, ids()), 1e-5)


def test_a_weight_that_something_else_reads_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.linear.weight.sum()

    module = seeded(Both())
    weight = module.linear.weight.detach()
    result, groups, sites = _rewritten(export(module, rows(4)))
    assert torch.equal(result.state_dict["linear.weight"], weight)
    dense = dense_weight(groups["linear"], sites["linear"])
    assert_close(
        "output", functional.linear(rows(4), dense, module.linear.bias) + weight.sum(), _run(result, rows(4)), 1e-5
    )


def test_a_module_used_twice_is_rewritten_twice() -> None:
    module = seeded(Twice())
    result, groups, sites = _rewritten(export(module, rows(4)))
    assert len(_calls(result, PACKED)) == 3
    assert len(_calls(result, ROTATE)) == 2
    assert sum(name.endswith(".codes") for name in result.state_dict) == 2
    assert_close("output", _dense_twin(module, groups, sites)(rows(4, seed=1)), _run(result, rows(4, seed=1)), 1e-5)


class Written(nn.Module):
    """Linears that read one node before and after it is written through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        whole = x * 2
        part = whole[1:]
        y = self.first(whole)
        part.mul_(3)
        return y + self.second(whole) * self.first(whole)


def test_a_value_that_was_written_is_rotated_again() -> None:
    module = seeded(Written())
    program = export(module, rows(4))
    assert [[site.name for site in group.sites] for group in find_sites(program).groups] == [["first"], ["second"]]
    done, groups, sites = _rewritten(program, rank=2)
    assert len(_calls(done, torch.ops.lopro.rotate.default)) == 3
    assert_close("rewritten", _dense_twin(module, groups, sites)(rows(4)), _run(done, rows(4)), 1e-5)


def test_a_program_that_is_one_linear() -> None:
    module = seeded(nn.Sequential(nn.Linear(WIDTH, 8)))
    result, groups, sites = _rewritten(export(module, rows(4)))
    assert_close("output", _dense_twin(module, groups, sites)(rows(4)), _run(result, rows(4)), 1e-5)


def test_products_that_are_left_still_run() -> None:
    module = seeded(Product())
    result, groups, sites = _rewritten(export(module, rows(4)))
    assert "weight" in result.state_dict
    assert_close("output", _dense_twin(module, groups, sites)(rows(4)), _run(result, rows(4)), 1e-5)


def test_a_missing_linear_is_an_error(case) -> None:
    _, program, result, groups, sites = case
    extra = {**sites, "blocks.9.q": replace(sites["blocks.0.q"], name="blocks.9.q")}
    with pytest.raises(GraphError, match=r"no Linear 'blocks.9.q' \(1 of 8 calibrated layers are missing\)"):
        RewritePass(groups, extra, {})(program)
    with pytest.raises(GraphError, match=r"7 of 7 .* not quantised or decomposed yet"):
        RewritePass(groups, sites, {})(result)
    with pytest.raises(GraphError, match="7 of 7"):
        RewritePass(groups, sites, {})(program.run_decompositions())


def test_another_shape_is_an_error(case) -> None:
    _, program, _, groups, sites = case
    taken = sites["blocks.0.o"]
    wrong = {**sites, "blocks.0.o": replace(taken, weight=replace(taken.weight, shape=(7, WIDTH)))}
    with pytest.raises(
        GraphError, match=r"Linear 'blocks.0.o' has a weight of \(32, 32\), but was calibrated as \(7, 32\)"
    ):
        RewritePass(groups, wrong, {})(program)


def test_part_of_a_group_can_be_rewritten(case) -> None:
    _, program, _, groups, sites = case
    result = RewritePass(groups, {"blocks.0.v": sites["blocks.0.v"]}, {})(program)
    assert len(_calls(result, PACKED)) == 1
    assert len(_calls(result, LINEAR)) == 7
    assert torch.isfinite(_run(result, ids())).all()


def test_export_save_and_load_give_the_same_bits(case) -> None:
    *_, result, _, _ = case
    stored = io.BytesIO()
    torch.export.save(result, stored)
    stored.seek(0)
    loaded = torch.export.load(stored)
    assert torch.equal(_run(loaded, ids(3, 5)), _run(result, ids(3, 5)))
    assert set(loaded.state_dict) == set(result.state_dict)
    assert len(_calls(loaded, PACKED)) == 7


def test_it_unflattens(case) -> None:
    *_, result, _, _ = case
    module = torch.export.unflatten(result)
    assert "blocks.0" in dict(module.named_modules())
    with torch.no_grad():
        assert torch.equal(module(ids(3, 5)), _run(result, ids(3, 5)))


def test_it_decomposes_to_aten_alone(case) -> None:
    *_, result, _, _ = case
    decomposed = result.run_decompositions()
    assert not [node for node in decomposed.graph.nodes if "lopro" in str(node.target) and node.op == "call_function"]
    assert_close("logits", _run(result, ids()), _run(decomposed, ids()), 1e-6)


def test_sizes_stay_dynamic(case) -> None:
    _, program, result, *_ = case
    assert result.range_constraints == program.range_constraints
    assert len(result.range_constraints) >= 2
    for shape in ((1, 1), (5, 2), (2, 40)):
        assert _run(result, ids(*shape)).shape == (*shape, 50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_programs_stay_narrow(dtype: torch.dtype) -> None:
    module = seeded(Twice()).to(dtype)
    program = export(module, rows(4).to(dtype))
    result, groups, sites = _rewritten(program)
    twin = _dense_twin(seeded(Twice()).double(), groups, sites).double()
    assert _run(result, rows(4).to(dtype)).dtype == dtype
    ratio = 3e-2 if dtype is torch.bfloat16 else 4e-3
    assert_close("output", twin(rows(4).to(dtype).double()), _run(result, rows(4).to(dtype)), ratio)
