from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.export import Dim

import lopro_fx
from lopro_fx.passes.record import META
from tests.deploy.models import Cached, LanguageModel, export_lm, quantized_lm, token_ids


@pytest.fixture(scope="module")
def loaded(saved):
    return lopro_fx.load(saved)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (2, 70)])
def test_loaded_program_computes_the_same_at_every_size(quantized, loaded, batch, length):
    ids = token_ids(batch, length)
    assert torch.equal(loaded.module()(ids), quantized.module()(ids))


def test_bfloat16_round_trip(tmp_path):
    program = quantized_lm(torch.bfloat16)
    lopro_fx.save(program, tmp_path / "bf16")
    loaded = lopro_fx.load(tmp_path / "bf16")
    assert loaded.state_dict["blocks.0.norm.weight"].dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded.module()(token_ids(1, 9)), program.module()(token_ids(1, 9)))


def _timeless(program):
    """The report without the seconds that the run took, which are not stored."""
    whole = lopro_fx.report(program)
    rows = tuple({key: value for key, value in row.items() if key != "seconds"} for row in whole.rows)
    return replace(whole, rows=rows, info={key: value for key, value in whole.info.items() if key != "seconds"})


def test_report_and_node_records_survive(quantized, loaded):
    assert _timeless(loaded) == _timeless(quantized)
    assert str(_timeless(loaded)) == str(_timeless(quantized))
    records = {node.name: node.meta[META] for node in quantized.graph.nodes if META in node.meta}
    assert len(records) > 6
    assert {node.name: node.meta[META] for node in loaded.graph.nodes if META in node.meta} == records


def test_graph_signature_and_sizes_survive(quantized, loaded):
    assert str(loaded.graph) == str(quantized.graph)
    assert loaded.graph_signature == quantized.graph_signature
    assert [str(bound) for bound in loaded.range_constraints.values()] == ["VR[1, int_oo]"] * 2
    assert all(torch.equal(a, b) for a, b in zip(loaded.example_inputs[0], quantized.example_inputs[0], strict=True))
    assert _module_paths(loaded) == _module_paths(quantized)
    assert "blocks.1" in _module_paths(loaded)["packed_linear_3"]


def _module_paths(program):
    """Node to the modules around it, outermost first."""
    return {node.name: [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            for node in program.graph.nodes}  # fmt: skip


def test_loaded_program_unflattens_to_its_modules(loaded):
    modules = dict(torch.export.unflatten(loaded).named_modules())
    assert {"blocks.0", "blocks.1.down", "head"} <= modules.keys()
    ids = token_ids(2, 6)
    with torch.no_grad():
        assert torch.equal(modules[""](ids), loaded.module()(ids))


def test_tied_weights_are_stored_once_and_tied_again(saved, loaded):
    with safe_open(saved / "tensors.safetensors", "pt") as file:
        stored = set(file.keys())
    assert "embed.weight" in stored
    assert "head.weight" not in stored
    assert loaded.state_dict["head.weight"] is loaded.state_dict["embed.weight"]
    assert isinstance(loaded.state_dict["head.weight"], nn.Parameter)


def test_saving_what_was_loaded_gives_the_same_bytes(saved, loaded, tmp_path):
    lopro_fx.save(loaded, tmp_path / "again")
    for path in saved.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_unquantised_program_round_trip(tmp_path):
    torch.manual_seed(1)
    program = export_lm(LanguageModel())
    lopro_fx.save(program, tmp_path / "plain")
    loaded = lopro_fx.load(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(loaded.module()(token_ids(1, 4)), program.module()(token_ids(1, 4)))
    # What was loaded is a program like any other: it can be quantised.
    assert lopro_fx.report(lopro_fx.quantize(loaded, None, lopro_fx.RTN(bits=4))).weights == 6 * 32 * 32


def test_caches_are_stored_empty_and_the_rest_is_kept(tmp_path):
    torch.manual_seed(0)
    model = Cached()
    x, position = torch.randn(2, 32), torch.tensor([0, 3])
    program = torch.export.export(model, (x, position))
    first = program.module()(x, position).detach()
    assert program.constants["cache"].abs().sum() > 0
    assert program.constants["cache"].requires_grad, "a run with gradients no longer dirties the cache: drop the detour"
    lopro_fx.save(program, tmp_path / "cached")
    assert program.constants["cache"].abs().sum() > 0, "saving changed the program"
    loaded = lopro_fx.load(tmp_path / "cached")
    assert not loaded.constants["cache"].any()
    assert not loaded.constants["cache"].requires_grad
    assert not loaded.constants["calls"].any()
    assert torch.equal(loaded.constants["slopes"], model.slopes)
    assert torch.equal(loaded.module()(x, position), first)


def test_strides_views_scalars_and_empty_tensors_survive(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(24.0).view(4, 6)
            self.register_buffer("turned", whole.clone().t())
            self.register_buffer("part", whole[1:3, 2:])
            self.register_buffer("scalar", torch.tensor(3))
            self.register_buffer("empty", torch.zeros(0, 6))
            self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

        def forward(self, x):
            rows = torch.cat([self.part.repeat(1, 2)[:, :6], self.empty])
            return (x * self.frozen) @ self.turned + rows.sum() + self.scalar

    program = torch.export.export(Odd(), (torch.ones(2, 6),))
    lopro_fx.save(program, tmp_path / "odd")
    loaded = lopro_fx.load(tmp_path / "odd")
    for name, tensor in program.state_dict.items():
        got = loaded.state_dict[name]
        assert torch.equal(got, tensor), name
        assert (got.dtype, got.requires_grad, type(got)) == (tensor.dtype, tensor.requires_grad, type(tensor)), name
    assert loaded.state_dict["turned"].stride() == (1, 6)
    assert torch.equal(loaded.module()(torch.ones(2, 6)), program.module()(torch.ones(2, 6)))


def test_nested_inputs_outputs_and_guards_survive(tmp_path):
    class Nested(nn.Module):
        def forward(self, x, *, extra, scale=None, flag=True):
            halves = x.view(x.shape[0] // 2, 2, -1)
            return {"sum": halves.sum(1) + extra["bias"][0], "rows": x.shape[0] // 2, "flag": flag}

    extra = {"bias": [torch.ones(3)]}
    shapes = {"x": {0: Dim.AUTO}, "extra": {"bias": [None]}, "scale": None, "flag": None}
    program = torch.export.export(
        Nested(), (torch.ones(6, 3),), {"extra": extra, "scale": None, "flag": True}, dynamic_shapes=shapes
    )
    lopro_fx.save(program, tmp_path / "nested")
    module = lopro_fx.load(tmp_path / "nested").module()
    got = module(torch.ones(4, 3), extra=extra, scale=None, flag=True)
    assert got["rows"] == 2
    assert torch.equal(got["sum"], torch.full((2, 3), 3.0))
    with pytest.raises((AssertionError, RuntimeError), match="2"):
        module(torch.ones(5, 3), extra=extra, scale=None, flag=True)


def test_state_round_trip_applies_to_another_export(tmp_path):
    torch.manual_seed(0)
    model = LanguageModel()
    config = lopro_fx.LoPRo(bits=2, group_size=32, rank=2, refits=0)
    state = lopro_fx.calibrate(export_lm(model), [token_ids(2, 16)], config)
    lopro_fx.save_state(state, tmp_path / "state")
    loaded = lopro_fx.load_state(tmp_path / "state")
    assert (loaded.config, loaded.skipped) == (state.config, state.skipped)
    assert loaded.info == {key: value for key, value in state.info.items() if key != "seconds"}
    assert loaded.packed_bytes == state.packed_bytes
    assert list(loaded.layers) == list(state.layers)
    one, two = (lopro_fx.apply(export_lm(model), each) for each in (state, loaded))
    assert _timeless(one) == _timeless(two)
    with torch.no_grad():
        assert torch.equal(one.module()(token_ids(1, 8)), two.module()(token_ids(1, 8)))
