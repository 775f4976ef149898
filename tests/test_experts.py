"""A mixture of experts, end to end: quantised, compiled, stored, resumed and budgeted like any Linear."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx.methods.base import Method
from lopro_fx.passes.calls import packed_calls
from lopro_fx.report.traffic import weight_bytes
from tests.helpers import generator, relative_rms
from tests.mixtures import EXPERTS, MixtureDecoder
from tests.programs import VOCAB, WIDTH, export, ids, seeded

METHODS: dict[str, Method] = {
    "rtn": lopro_fx.RTN(bits=4, group_size=32),
    "lopro": lopro_fx.LoPRo(bits=3, rank=4, importance="gradient"),
    "tileq": lopro_fx.TileQ(bits=3, tile_rank=4),
    "lrc": lopro_fx.LRC(group_size=32, rank=4),
    "trellis": lopro_fx.TileQ(format="trellis", bits=2, window=12, tile_rank=4),
}


@functools.cache
def _program(form: str = "batched") -> ExportedProgram:
    return export(seeded(MixtureDecoder(form)), ids(2, 7), dynamic=True)


def _batches(count: int = 4) -> list[Tensor]:
    return [torch.randint(VOCAB, (2, 16), generator=generator(seed)) for seed in range(count)]


@functools.cache
def _quantised(name: str) -> ExportedProgram:
    return lopro_fx.quantize(_program(), _batches(), METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_stored_and_optimised_programs_agree(name: str, tmp_path: Path) -> None:
    quantised = _quantised(name)
    lopro_fx.save(quantised, tmp_path / "program")
    loaded = lopro_fx.load(tmp_path / "program")
    state = lopro_fx.calibrate(_program(), _batches(), METHODS[name])
    lopro_fx.save_state(state, tmp_path / "state")
    # The same state fits the other form of the same model.
    other = lopro_fx.apply(_program("grouped"), lopro_fx.load_state(tmp_path / "state"))
    fast = lopro_fx.optimize(loaded, target="cpu", activations="float")
    assert len(packed_calls(fast.graph, "cpu_experts")) == 2
    assert not packed_calls(fast.graph, "experts")
    for shape in ((1, 1), (2, 1), (3, 16)):
        x = torch.randint(VOCAB, shape, generator=generator(shape[1]))
        want = quantised.module()(x)
        assert torch.equal(loaded.module()(x), want)
        assert relative_rms(want, other.module()(x)) < 1e-5
        assert relative_rms(want, fast.module()(x)) < 1e-5
    assert lopro_fx.report(quantised).bits_per_weight == pytest.approx(state.bits_per_weight)


def test_compiled_programs_agree() -> None:
    quantised = _quantised("tileq")
    for program in (quantised, lopro_fx.optimize(quantised, target="cpu", activations="float")):
        compiled = torch.compile(program.module(), fullgraph=True, dynamic=True)
        for length in (1, 5):
            x = torch.randint(VOCAB, (2, length), generator=generator(length))
            assert relative_rms(quantised.module()(x), compiled(x)) < 1e-5


def test_coverage_is_reported() -> None:
    rows = {row["name"]: row for row in lopro_fx.report(_quantised("lopro")).rows}
    counts = rows["experts.down_proj"]["expert_tokens"]
    assert (len(counts), sum(counts)) == (EXPERTS, 2 * 2 * 16 * 4)
    assert "experts have fewer tokens than 64 inputs" in rows["experts.down_proj"]["warning"]


def test_a_run_that_stopped_goes_on(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(done: int, total: int, label: str) -> None:
        if "down_proj" in label:
            raise Stop

    method = METHODS["tileq"]
    with pytest.raises(Stop):
        lopro_fx.quantize(_program(), _batches(), method, resume=tmp_path / "run", progress=progress)
    again = lopro_fx.quantize(_program(), _batches(), method, resume=tmp_path / "run")
    x = torch.randint(VOCAB, (2, 5), generator=generator())
    assert torch.equal(again.module()(x), _quantised("tileq").module()(x))


def test_a_budget_divides_the_bytes_among_experts_too() -> None:
    budget = lopro_fx.Budget(bits_per_weight=4.0)
    state = lopro_fx.calibrate(_program(), _batches(), lopro_fx.LoPRo(rank=0), budget=budget)
    assert state.bits_per_weight <= 4.0
    assert {"experts.gate_up_proj", "experts.down_proj"} <= state.layers.keys()


def test_a_token_reads_the_weights_of_its_experts() -> None:
    one = lopro_fx.quantize(export(seeded(MixtureDecoder()), ids(1, 1)), config=METHODS["rtn"])
    many = lopro_fx.quantize(export(seeded(MixtureDecoder()), ids(2, 16)), config=METHODS["rtn"])
    experts = sum(t.nbytes for name, t in one.state_dict.items() if "_proj" in name)
    rows = 31 * 4 * WIDTH  # of the embedding
    assert weight_bytes(many) - weight_bytes(one) == experts * (EXPERTS - 2) // EXPERTS + rows
