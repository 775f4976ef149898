"""The format "trellis" goes wherever "affine" does: methods, files, packages, folders, reports."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from transformers import AutoModelForCausalLM

import lopro_fx
from lopro_fx import GPTQ, RTN, LoPRo
from lopro_fx.errors import ConfigError
from lopro_fx.layer import dense_weight
from lopro_fx.methods.registry import from_dict
from lopro_fx.methods.rounding import Rounding
from lopro_fx.models import export_causal_lm
from lopro_fx.state import state_of
from tests.helpers import assert_close, generator, package_error
from tests.programs import tiny_llama

CONFIGS: dict[str, Rounding] = {
    "lopro": LoPRo(format="trellis", bits=3, window=12, strip=32, rank=2, importance="gradient", head_bits=8),
    "gptq": GPTQ(format="trellis", bits=2, window=12, act_bits=8),
    "rtn": RTN(format="trellis", bits=1.5, window=13),
}


def _ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(97, (batch, length), generator=generator())


@functools.cache
def _program() -> ExportedProgram:
    return export_causal_lm(tiny_llama(64, 99))


@functools.cache
def _state(name: str) -> lopro_fx.QuantState:
    return lopro_fx.calibrate(_program(), [_ids(8, 30)], CONFIGS[name])


def _run(program: ExportedProgram, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        result = program.module()(_ids() if ids is None else ids)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", CONFIGS)
def test_every_bit_is_counted(name: str) -> None:
    state = _state(name)
    for layer in state.layers.values():
        if layer.weight.format == "trellis":
            rows, width = layer.weight.shape
            columns = layer.weight.spec["columns"]
            assert isinstance(columns, int)
            filled = -(-rows // 32) * 32 * -(-width // columns) * columns
            size = sum(tensor.nbytes for tensor in layer.weight.tensors.values())
            assert size == filled * CONFIGS[name].bits / 8 + layer.weight.tensors["scales"].nbytes
    assert {layer.weight.format for layer in state.layers.values()} >= {"trellis"}
    report = lopro_fx.report(lopro_fx.apply(_program(), state))
    assert report.packed_bytes == state.packed_bytes
    assert "trellis" in {row["format"] for row in report.rows}


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    quantized = lopro_fx.apply(_program(), _state(name))
    lopro_fx.save(quantized, tmp_path / "program")
    lopro_fx.save_state(_state(name), tmp_path / "state")
    want = _run(quantized)
    loaded = lopro_fx.load(tmp_path / "program")
    assert torch.equal(_run(loaded), want)
    for state in (lopro_fx.load_state(tmp_path / "state"), state_of(loaded)):
        assert torch.equal(_run(lopro_fx.apply(_program(), state)), want)
        assert from_dict(state.config) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_optimised(name: str, target: str) -> None:
    quantized = lopro_fx.apply(_program(), _state(name))
    optimised = lopro_fx.optimize(quantized, target=target, activations="float")
    assert_close("logits", _run(quantized), _run(optimised), 1e-5)
    if target == "cpu":
        operators = {row["operator"] for row in lopro_fx.backend_report(optimised, device="cpu").rows}
        assert "trellis_cpu" in operators
        assert "trellis_linear" not in operators


def test_compiled() -> None:
    quantized = lopro_fx.optimize(lopro_fx.apply(_program(), _state("lopro")))
    with torch.no_grad():
        result = torch.compile(quantized.module())(_ids())
    assert_close("logits", _run(quantized), result[0] if isinstance(result, tuple) else result, 1e-5)


def test_a_package_runs_in_a_process_that_knows_nothing_of_it(tmp_path: Path) -> None:
    quantized = lopro_fx.optimize(lopro_fx.apply(_program(), _state("lopro")), target="cpu", activations="float")
    lopro_fx.export_aoti(quantized, tmp_path / "model.pt2")
    assert package_error(tmp_path, _ids(), _run(quantized)) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_a_transformers_folder(name: str, tmp_path: Path) -> None:
    lopro_fx.save_pretrained(tiny_llama(64, 99), _state(name), tmp_path / "folder", activations="float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    want = _run(lopro_fx.apply(_program(), _state(name)))
    with torch.no_grad():
        assert_close("logits", want, loaded(_ids()).logits, 1e-5)
    lopro_fx.save_pretrained(tiny_llama(64, 99), _state(name), tmp_path / "int8", activations="int8")
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        assert_close("rounded activations", want, rounded(_ids()).logits, 0.03)
    weight = loaded.dequantize().model.layers[1].mlp.up_proj.weight
    layer = _state(name).layers["model.layers.1.mlp.up_proj"]
    assert torch.equal(weight, dense_weight(_state(name).inputs[layer.input], layer))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "trellis", "bits": 8}, r"RTN\(bits=8\): allowed are 1.5, 2, 2.5, 3, 4"),
        ({"format": "trellis", "group_size": 64}, r"group_size=64.*'trellis' has no such setting"),
        ({"format": "trellis", "window": 20}, r"window=20"),
        ({"window": 14}, r"window=14.*'affine' has no such setting"),
        ({"bits": 2.5}, r"RTN\(bits=2.5\): allowed are 2, 3, 4, 8"),
        ({"format": "treliss"}, r"format 'treliss' is not known.*affine, trellis"),
    ],
)
def test_settings_of_another_format_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RTN(**values)
