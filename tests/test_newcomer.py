"""Methods and formats of others, in the forms in which a newcomer wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lopro_fx
from lopro_fx.cli import main
from lopro_fx.errors import CheckpointError, ConfigError
from lopro_fx.kernels.formats.base import Format, Packed
from lopro_fx.kernels.formats.registry import FORMATS, register_format
from lopro_fx.layer import Layer
from lopro_fx.methods.base import Method, Solved, setting
from lopro_fx.methods.registry import METHODS, register_method
from tests.guests import packed_signs
from tests.helpers import assert_close
from tests.passes.quantised import assert_same, reasons
from tests.programs import decoder, ids


class Shifted(Format):
    """int8 codes times `mul` plus `add`: numbers that JSON, which is sorted, stores in another order."""

    name, spec = "shifted", {"mul": 1.0, "add": 0.0, "order": "low", "k": 4}

    def empty(self, shape, spec):
        return Packed(self.name, shape, spec, {"codes": torch.empty(shape, dtype=torch.int8, device="meta")})

    def dequantize(self, packed, dtype):
        spec = packed.spec
        return (packed.tensors["codes"].float() * spec["mul"] + spec["add"]).to(dtype)


if Shifted.name not in FORMATS:
    register_format(Shifted())


def _shifted(weight: Tensor) -> Packed:
    step = (weight.abs().max() / 127).item()
    codes = (weight / step).round().to(torch.int8)
    return Packed("shifted", tuple(weight.shape), {"mul": step, "add": 0.001, "order": "low", "k": 4}, {"codes": codes})


@dataclass(frozen=True, kw_only=True)
class Two(Method):
    """k and up in one format, the others in another; or all in the first."""

    alone: bool = False
    name = "two"

    def solve(self, unit, seen, context):
        layers = [
            Layer(name, unit.name, _shifted(w) if self.alone or name[-1] in "kp" else packed_signs(w))
            for name, w in zip(unit.names, unit.weights, strict=True)
        ]
        return Solved(unit.input(), tuple(layers))


def test_numbers_of_a_format_keep_their_order_in_every_file(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.programs import tiny_llama
    from tests.test_guests import _ids, _program, _run

    state = lopro_fx.calibrate(_program(), [_ids()], Two(alone=True))
    want = _run(lopro_fx.apply(_program(), state))
    lopro_fx.save_state(state, tmp_path / "state")
    assert torch.equal(_run(lopro_fx.apply(_program(), lopro_fx.load_state(tmp_path / "state"))), want)
    lopro_fx.save_pretrained(tiny_llama(32, 48), state, tmp_path / "folder")
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")(_ids()).logits
    assert_close("logits", want, got, 1e-5)


@pytest.mark.parametrize("target", [None, "cpu", "cuda"])
def test_two_formats_may_read_one_input(target: str | None) -> None:
    program = lopro_fx.quantize(decoder(depth=1, bias=True)[1], [ids()], Two())
    optimised = lopro_fx.optimize(program, target=target)
    assert_same(program, optimised, ids(), ratio=1e-5)
    assert "differ in format" in reasons(optimised, "merge")["blocks.0.k"]


@pytest.mark.parametrize("act_bits", [0, 8])
def test_kernels_of_rounded_activations_are_reported_without_a_gpu(act_bits: int) -> None:
    program = lopro_fx.quantize(decoder(depth=1)[1], None, lopro_fx.RTN(bits=4, group_size=32, act_bits=act_bits))
    rows = lopro_fx.backend_report(program).rows
    assert {row["operator"] for row in rows} == {"packed_linear", *(["round_activation"] if act_bits else [])}


def test_a_run_with_other_code_is_another_run(tmp_path: Path) -> None:
    def journaled(method: type[Method]) -> None:
        lopro_fx.calibrate(decoder(depth=1)[1], None, method(), resume=tmp_path / "run")

    @dataclass(frozen=True, kw_only=True)
    class Changed(Method):
        name = "two"

        def solve(self, unit, seen, context):
            return Two(alone=True).solve(unit, seen, context)

    journaled(Two)
    with pytest.raises(CheckpointError, match="another model, calibration, setting or version"):
        journaled(Changed)


@pytest.fixture
def registered():
    before = dict(METHODS)
    yield register_method
    METHODS.clear()
    METHODS.update(before)


def test_methods_of_one_s_own_share_the_flags_of_the_command_line(registered, capsys) -> None:
    @registered
    @dataclass(frozen=True, kw_only=True)
    class Wide(Two):
        bits: float = setting(2.5, "100% mine")
        name = "wide"

    assert main(["quantize", "--help"]) == 0
    assert "of a weight; affine" in capsys.readouterr().out
    # The built-in methods take whole numbers as before; what fails is the model's name.
    for method in ("rtn", "wide"):
        assert main(["quantize", "/nonexistent", "--method", method, "--bits", "4"]) == 2
        assert "bits=" not in capsys.readouterr().err


def test_a_setting_with_the_name_of_another_flag_is_refused(registered, capsys) -> None:
    @registered
    @dataclass(frozen=True, kw_only=True)
    class Placed(Two):
        device: str = setting("cpu", "where")
        name = "placed"

    assert main(["quantize", "/nonexistent"]) == 2
    assert "'device' has the name of another flag" in capsys.readouterr().err


def test_what_is_no_method_or_format_is_refused() -> None:
    for wrong in (Two(), int, Method):
        with pytest.raises(ConfigError, match="register_method"):
            register_method(wrong)
    with pytest.raises(ConfigError, match="register_format"):
        register_format(Shifted)
    for wrong in ("lopro", lopro_fx.RTN):
        with pytest.raises(ConfigError, match="give a method"):
            lopro_fx.explain(decoder()[1], wrong)


def test_a_method_that_measures_nothing_and_reads_it_is_told() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Blind(Method):
        name = "blind"

        def solve(self, unit, seen, context):
            return lopro_fx.RTN(bits=4).solve(unit, seen, context)

    with pytest.raises(ConfigError, match=r"observers\(\) lack Gram\(\)"):
        lopro_fx.calibrate(decoder(depth=1)[1], None, Blind())
