"""A format of two functions and a method of ten lines (tests/guests.py) go wherever LoPRo does."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from transformers import AutoModelForCausalLM

import lopro_fx
from lopro_fx.errors import CheckpointError, ConfigError
from lopro_fx.kernels.formats.base import Packed
from lopro_fx.kernels.formats.registry import FORMATS, register_format
from lopro_fx.layer import dense_weight
from lopro_fx.methods.registry import METHODS, register_method
from lopro_fx.models import export_causal_lm
from lopro_fx.state import state_of
from tests.guests import Sign, Signs
from tests.helpers import assert_close, generator, package_error
from tests.programs import tiny_llama

ACTIVATIONS = [0, 8, 4]


def _ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(97, (batch, length), generator=generator())


@functools.cache
def _program() -> ExportedProgram:
    return export_causal_lm(tiny_llama(32, 48))


@functools.cache
def _state(act_bits: int = 0) -> lopro_fx.QuantState:
    return lopro_fx.calibrate(_program(), [_ids()], Signs(act_bits=act_bits))


def _run(program: ExportedProgram, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        result = program.module()(_ids() if ids is None else ids)
    return result[0] if isinstance(result, tuple) else result


def test_the_program_computes_with_the_format() -> None:
    state, twin = _state(), copy.deepcopy(tiny_llama(32, 48))
    assert {layer.weight.format for layer in state.layers.values()} == {"sign"}
    with torch.no_grad():
        for name, layer in state.layers.items():
            weight = twin.get_submodule(name).weight
            dense = dense_weight(state.inputs[layer.input], layer)
            assert torch.equal(dense, weight.sign() * weight.abs().mean(1, keepdim=True))
            weight.copy_(dense)
        want = twin(_ids()).logits
    assert_close("logits", want, _run(lopro_fx.apply(_program(), state)), 1e-5)


@pytest.mark.parametrize("act_bits", ACTIVATIONS)
def test_saved_and_loaded(tmp_path: Path, act_bits: int) -> None:
    quantized = lopro_fx.apply(_program(), _state(act_bits))
    lopro_fx.save(quantized, tmp_path / "program")
    lopro_fx.save_state(_state(act_bits), tmp_path / "state")
    want = _run(quantized)
    loaded = lopro_fx.load(tmp_path / "program")
    assert torch.equal(_run(loaded), want)
    for state in (lopro_fx.load_state(tmp_path / "state"), state_of(loaded)):
        assert torch.equal(_run(lopro_fx.apply(_program(), state)), want)


@pytest.mark.parametrize("act_bits", ACTIVATIONS)
@pytest.mark.parametrize("target", [None, "cpu", "cuda"])
def test_optimised(act_bits: int, target: str | None) -> None:
    quantized = lopro_fx.apply(_program(), _state(act_bits))
    optimised = lopro_fx.optimize(quantized, target=target)
    assert len(list(optimised.graph.nodes)) < len(list(quantized.graph.nodes))
    assert_close("logits", _run(quantized), _run(optimised), 1e-5)


def test_compiled() -> None:
    quantized = lopro_fx.optimize(lopro_fx.apply(_program(), _state()))
    compiled = torch.compile(quantized.module())
    with torch.no_grad():
        result = compiled(_ids())
    assert_close("logits", _run(quantized), result[0] if isinstance(result, tuple) else result, 1e-5)


def test_a_package_runs_in_a_process_that_knows_nothing_of_it(tmp_path: Path) -> None:
    quantized = lopro_fx.optimize(lopro_fx.apply(_program(), _state(8)), target="cpu")
    lopro_fx.export_aoti(quantized, tmp_path / "model.pt2")
    assert package_error(tmp_path, _ids(), _run(quantized)) < 1e-5


@pytest.mark.parametrize("act_bits", ACTIVATIONS)
def test_a_transformers_folder(tmp_path: Path, act_bits: int) -> None:
    lopro_fx.save_pretrained(tiny_llama(32, 48), _state(act_bits), tmp_path / "folder", activations="float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    want = _run(lopro_fx.apply(_program(), _state(act_bits)))
    with torch.no_grad():
        assert_close("logits", want, loaded(_ids()).logits, 1e-5)
        assert torch.equal(loaded.generate(_ids(1, 5), max_new_tokens=3, do_sample=False)[:, :5], _ids(1, 5))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(_ids()).logits, loaded(_ids()).logits)
    weight = loaded.dequantize().model.layers[1].mlp.up_proj.weight
    layer = _state(act_bits).layers["model.layers.1.mlp.up_proj"]
    assert torch.equal(weight, dense_weight(_state(act_bits).inputs[layer.input], layer))


def test_it_is_reported() -> None:
    quantized = lopro_fx.apply(_program(), _state())
    report = lopro_fx.report(quantized)
    assert {row["format"] for row in report.rows} == {"sign"}
    # A bit a weight and an fp32 scale a row.
    sizes = [row["shape"] for row in report.rows]
    assert report.packed_bytes == sum(rows * (columns // 8 + 4) for rows, columns in sizes)
    assert "signs" in str(report)
    kernels = lopro_fx.backend_report(quantized)
    assert {row["operator"] for row in kernels.rows} == {"sign_linear"}
    assert kernels.totals["flops"] == sum(2 * rows * columns for rows, columns in sizes)
    assert [line.name for line in lopro_fx.explain(_program(), Signs()).taken] == [row["name"] for row in report.rows]


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    want = _state().layers
    for _ in range(2):
        state = lopro_fx.calibrate(_program(), [_ids()], Signs(), resume=tmp_path / "journal")
        for name, layer in state.layers.items():
            assert all(torch.equal(want[name].tensors[key], tensor) for key, tensor in layer.tensors.items())


def test_what_is_not_registered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lopro_fx.save_state(_state(), tmp_path / "state")
    monkeypatch.delitem(FORMATS, "sign")
    with pytest.raises((ConfigError, CheckpointError), match=r"format 'sign'.*register_format"):
        lopro_fx.load_state(tmp_path / "state")


def test_a_program_of_an_unknown_format_says_what_to_import(tmp_path: Path) -> None:
    lopro_fx.save(lopro_fx.apply(_program(), _state()), tmp_path / "program")
    script = "import lopro_fx, sys; lopro_fx.load(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "program")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "CheckpointError" in done.stderr.splitlines()[-1]
    assert "lopro.sign_linear" in done.stderr.splitlines()[-1]
    assert "import the package that defines it" in done.stderr.splitlines()[-1]


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ConfigError, match="'sign' is registered"):
        register_format(Sign())
    with pytest.raises(ConfigError, match="'signs' is registered"):
        register_method(METHODS["signs"])

    class Dashed(Sign):
        name = "a-b"

    with pytest.raises(ConfigError, match="identifier"):
        register_format(Dashed())

    class Shadowing(Sign):
        name = "shadowing"

        def empty(self, shape, spec):
            return Packed(self.name, shape, spec, {"x": torch.empty(shape, device="meta")})

    with pytest.raises(ConfigError, match="'x' has the name of another operand"):
        register_format(Shadowing())


def test_a_format_that_can_not_be_defined_is_not_there() -> None:
    class Packs(Sign):
        name = "packed"

    class Flag(Sign):
        name, spec = "flag", {"fast": True}

    for format, words in ((Packs(), "exist already"), (Flag(), "'fast' is a bool")):
        with pytest.raises(ConfigError, match=words):
            register_format(format)
        assert format.name not in FORMATS


def test_gradients_pass_rounded_activations_whose_values_are_those_of_the_program() -> None:
    packed = lopro_fx.pack_model(tiny_llama(32, 48), _state(4), activations="float")
    want = _run(lopro_fx.apply(_program(), _state(4)))
    embedding = packed.get_input_embeddings().weight
    logits = packed(_ids()).logits
    assert_close("logits", want, logits, 1e-4)
    (gradient,) = torch.autograd.grad(logits.square().mean(), embedding)
    assert gradient.norm() > 0
