"""Whole programs of several model families: exported, quantised, run, compiled."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch._dynamo.utils import counters
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx import FLRQ, GPTQ, RTN, LoPRo, Method, QuantState
from lopro_fx.evaluation.perplexity import perplexity
from lopro_fx.layer import dense_weight
from lopro_fx.models import export_causal_lm, load_model
from lopro_fx.state import state_of
from tests.families import QUANTISED, as_stored, batches, causal_lm, family
from tests.helpers import SHARED, TOLERANCE, assert_close

CONFIG = LoPRo(bits=4, group_size=32, rank=2, clip_steps=8)
COARSE = LoPRo(bits=2, group_size=32, rank=0, clip_steps=8)


def _run(program: ExportedProgram, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return program.module()(*inputs)


@functools.cache
def _state(name: str, config: Method = CONFIG, dtype: torch.dtype = torch.float32) -> QuantState:
    chosen = family(name, dtype)
    return lopro_fx.calibrate(chosen.program, batches(chosen), config)


def _quantised(name: str, config: Method = CONFIG, dtype: torch.dtype = torch.float32) -> ExportedProgram:
    return lopro_fx.apply(family(name, dtype).program, _state(name, config, dtype))


def _stored(program: ExportedProgram) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in program.state_dict.items()}


def _twin(name: str, state: QuantState) -> torch.nn.Module:
    """The family's program in fp32 with every packed weight as a dense one, each near the one that it stands for."""
    module = copy.deepcopy(family(name).program.module())
    for site in state.layers.values():
        dense, weight = dense_weight(state.inputs[site.input], site), module.get_parameter(f"{site.name}.weight")
        assert_close(site.name, weight, as_stored(name, site.name, dense), 0.2)
        weight.data = as_stored(name, site.name, dense)
    return module


@pytest.mark.parametrize(
    ("name", "config"),
    [*((name, CONFIG) for name in QUANTISED), ("llama", RTN(bits=4, group_size=32)),
     ("llama", GPTQ(bits=4, group_size=32, act_order="column")),
     ("llama", FLRQ(bits=4, group_size=32, rank_budget=1.0, least_gain=0)),
     ("llama", FLRQ.paper(bits=4, group_size=32))],
)  # fmt: skip
def test_packed_and_fake_quantised_programs_are_one(name: str, config: Method) -> None:
    chosen, state = family(name), _state(name, config)
    module = _twin(name, state)
    for size in (2, 13):
        inputs = chosen.inputs(size, 7)
        with torch.no_grad():
            expected = module(*inputs)
        got = _run(_quantised(name, config), inputs)
        assert got.dtype == expected.dtype
        assert_close(f"{name}, size {size}", expected, got, 2e-5)


@pytest.mark.parametrize("name", QUANTISED)
def test_every_linear_is_taken_or_listed(name: str) -> None:
    program = _quantised(name)
    explained, reported = lopro_fx.explain(family(name).program, CONFIG), lopro_fx.report(program)
    assert {line.name for line in explained.taken} == {row["name"] for row in reported.rows}
    assert all(line.reason for line in explained.skipped)
    assert [(line.name, line.reason) for line in explained.skipped] == list(reported.skipped)
    linears = list(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))
    assert len(linears) == len([line for line in explained.skipped if "aten.linear" not in line.reason])
    assert all(row["relative_loss"] < 0.1 for row in reported.rows)
    assert set(program.range_constraints.items()) == set(family(name).program.range_constraints.items())


def _compiled(program: ExportedProgram, chosen: Any, backend: str, ratio: float) -> None:
    """Three sizes through one compiled graph, each equal to eager."""
    torch._dynamo.reset()
    counters.clear()
    module = program.module()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for size in (12, 5, 31):
            inputs = chosen.inputs(size, 5)
            assert_close(f"size {size}", module(*inputs), compiled(*inputs), ratio)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("name", QUANTISED)
def test_one_compiled_graph_serves_every_length(name: str) -> None:
    _compiled(_quantised(name), family(name), "eager", 1e-6)


def test_inductor_gives_the_eager_logits() -> None:
    _compiled(_quantised("llama"), family("llama"), "inductor", 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_stay_narrow(dtype: torch.dtype) -> None:
    inputs = family("llama").inputs(13, 99)
    got = _run(_quantised("llama", CONFIG, dtype), inputs)
    assert got.dtype == dtype
    with torch.no_grad():
        expected = _twin("llama", _state("llama", CONFIG, dtype))(*inputs)
    assert_close(str(dtype), expected, got, 4 * TOLERANCE[dtype])


def test_naming_a_tied_head_alone_takes_it_alone() -> None:
    chosen = family("gpt2")
    config = LoPRo(bits=8, rank=0, group_size=32, include="lm_head")
    state = lopro_fx.calibrate(chosen.program, batches(chosen), config)
    taken = lopro_fx.apply(chosen.program, state)
    assert [row["name"] for row in lopro_fx.report(taken).rows] == list(state.layers) == ["lm_head"]
    inputs = chosen.inputs(9, 3)
    with torch.no_grad():
        hidden: list[Tensor] = []
        twin = causal_lm("gpt2")
        twin.lm_head.register_forward_pre_hook(lambda _, seen: hidden.append(seen[0]))
        twin(*inputs, use_cache=False)
        expected = hidden[0] @ dense_weight(state.inputs[state.layers["lm_head"].input], state.layers["lm_head"]).T
    assert_close("logits", expected, _run(taken, inputs), 2e-5)


def test_the_same_seed_gives_the_same_bytes() -> None:
    chosen = family("llama")
    first, second = _stored(_quantised("llama")), _stored(lopro_fx.quantize(chosen.program, batches(chosen), CONFIG))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_input_program_is_left_as_it_was() -> None:
    chosen = family("qwen3")
    before = {name: tensor.clone() for name, tensor in _stored(chosen.program).items()}
    code = chosen.program.graph_module.code
    lopro_fx.quantize(chosen.program, batches(chosen), COARSE)
    assert chosen.program.graph_module.code == code
    assert all(torch.equal(tensor, before[name]) for name, tensor in _stored(chosen.program).items())


@pytest.mark.parametrize("method", [LoPRo, FLRQ, GPTQ])
def test_a_data_free_run_warns(method: type[Method]) -> None:
    chosen = family("llama")
    with pytest.warns(UserWarning, match=f"{method.__name__}.*data-free"):
        program = lopro_fx.quantize(chosen.program, None, method(bits=8, group_size=32, clip_steps=0))
    inputs = chosen.inputs(13, 99)
    with torch.no_grad():
        expected = _twin("llama", state_of(program))(*inputs)
    assert_close("logits", expected, _run(program, inputs), 2e-5)


def test_rounding_to_nearest_needs_no_data_and_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lopro_fx.quantize(family("llama").program, None, RTN(bits=4, group_size=32, clip_steps=0))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_bits_per_weight_are_the_bytes_of_the_file(name: str, tmp_path: Path) -> None:
    state = _state(name)
    lopro_fx.save_state(state, tmp_path / "state")
    with safe_open(tmp_path / "state" / "tensors.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).numel() * file.get_tensor(key).element_size() for key in file.keys())  # noqa: SIM118
    raw = (tmp_path / "state" / "tensors.safetensors").read_bytes()
    assert len(raw) - 8 - int.from_bytes(raw[:8], "little") == stored == state.packed_bytes
    reported = lopro_fx.report(_quantised(name))
    assert reported.packed_bytes == stored
    assert reported.bits_per_weight == state.bits_per_weight == 8 * stored / state.weights
    by_row = sum(row["bits_per_weight"] * row["shape"][0] * row["shape"][1] for row in reported.rows)
    assert by_row == pytest.approx(8 * stored)


def test_a_small_story_model_keeps_more_than_rounding_does(stories: Path) -> None:
    text = SHARED / "data" / "tinystories.txt"
    if not text.is_file():
        pytest.skip(f"{text} is absent")
    loaded = load_model(str(stories), torch.float32)
    ids = loaded.tokenizer(text.read_text()[:60_000], return_tensors="pt", add_special_tokens=False).input_ids[0]
    windows = ids[: 24 * 256].view(24, 256)
    program = export_causal_lm(loaded.model)

    def score(quantised: ExportedProgram) -> float:
        return perplexity(quantised.module(), windows[16:]).ppl

    original = score(program)
    nearest = score(lopro_fx.quantize(program, None, RTN(bits=3)))
    solved = score(lopro_fx.quantize(program, [windows[i : i + 4] for i in range(0, 16, 4)], LoPRo(bits=3)))
    assert original < solved < nearest
