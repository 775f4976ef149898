"""What a method may return: everything else is refused at once, by unit, layer and value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

import lopro_fx
from lopro_fx.errors import CalibrationError, ConfigError
from lopro_fx.layer import Activation, Factor, Input, Layer, Transform
from lopro_fx.methods.base import Method, Solved
from tests.guests import packed_signs
from tests.programs import decoder, ids


@dataclass(frozen=True, kw_only=True)
class _Changed(Method):
    """One bit a weight, changed by a function before it is returned."""

    name = "changed"
    change: Callable[[Solved], object]

    def solve(self, unit, seen, context):
        layers = [Layer(n, unit.name, packed_signs(w)) for n, w in zip(unit.names, unit.weights, strict=True)]
        return self.change(Solved(unit.input(), tuple(layers)))


def _layer(**changes) -> Callable[[Solved], Solved]:
    """A change of the first layer."""
    return lambda solved: replace(solved, layers=(replace(solved.layers[0], **changes), *solved.layers[1:]))


def _weight(change) -> Callable[[Solved], Solved]:
    return lambda solved: _layer(weight=change(solved.layers[0].weight))(solved)


def _input(change: Callable[[Input], Input]) -> Callable[[Solved], Solved]:
    return lambda solved: replace(solved, input=change(solved.input))


def _transform(**options) -> Callable[[Solved], Solved]:
    return _input(lambda shared: replace(shared, transform=Transform(**options)))


def _spoiled(weight):
    size = weight.tensors["size"].clone()
    size[3] = torch.nan
    return replace(weight, tensors={**weight.tensors, "size": size})


HALF = Factor(torch.zeros(2, 32, dtype=torch.float16), None, 0)
WRONG: dict[str, tuple[Callable[[Solved], object], str]] = {
    "nothing": (lambda solved: None, "returned a NoneType"),
    "layers alone": (lambda solved: solved.layers, "returned a tuple"),
    "order": (lambda solved: replace(solved, layers=solved.layers[::-1]), r"blocks\.0\.v, blocks\.0\.k.*in this order"),
    "a layer less": (lambda solved: replace(solved, layers=solved.layers[:-1]), "in this order"),
    "input of a layer": (_layer(input="foo"), r"layer 'blocks\.0\.q'.*'foo'"),
    "name of the input": (_input(lambda shared: replace(shared, name="foo")), r"unit\.input\(\)"),
    "width": (_input(lambda shared: replace(shared, in_features=33)), r"33.*unit\.input\(\)"),
    "shape": (_weight(lambda weight: replace(weight, shape=(31, 32))), r"it is \(31, 32\).*\(32, 32\)"),
    "format": (_weight(lambda weight: replace(weight, format="foo")), "format 'foo' is not known"),
    "spec": (_weight(lambda weight: replace(weight, spec={"k": 4})), r"'k': 4.*needs none"),
    "missing tensor": (_weight(lambda weight: replace(weight, tensors={"bits": weight.tensors["bits"]})), "'size'"),
    "order of tensors": (
        _weight(lambda weight: replace(weight, tensors=dict(reversed(weight.tensors.items())))), "format 'sign' needs",
    ),
    "dtype": (
        _weight(lambda weight: replace(weight, tensors={**weight.tensors, "bits": weight.tensors["bits"].int()})),
        r"'bits' is torch\.int32.*torch\.uint8",
    ),
    "no data": (_weight(lambda weight: weight.map(lambda tensor: tensor.to("meta"))), "'bits' lies on meta"),
    "NaN": (_weight(_spoiled), r"layer 'blocks\.0\.q': it holds NaN"),
    "metrics": (_layer(metrics={"a": torch.ones(1)}), "JSON"),
    "block": (_transform(block=3), "block 3"),
    "block and skip": (_transform(block=32, skip=16), "block 32 after 16 columns"),
    "no permutation": (_transform(perm=torch.zeros(32, dtype=torch.int16)), "no permutation"),
    "dtype of a permutation": (_transform(perm=torch.arange(32)), "int64"),
    "signs": (_transform(signs=torch.zeros(32, dtype=torch.uint8), block=32), "signs"),
    "bits of an activation": (_input(lambda shared: replace(shared, activation=Activation(3, 32))), "bits=3"),
    "group of an activation": (_input(lambda shared: replace(shared, activation=Activation(8, 0))), "group=0"),
    "down alone": (_input(lambda shared: replace(shared, down=HALF)), "both its down and its up"),
    "dtype of a factor": (
        _input(lambda shared: replace(shared, down=replace(HALF, values=HALF.values.float()))), "down is torch.float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("data", [True, False], ids=["calibrated", "data-free"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str, data: bool) -> None:
    change, words = WRONG[name]
    _, program = decoder(depth=1)
    with pytest.raises((CalibrationError, ConfigError), match=words):
        lopro_fx.calibrate(program, [ids()] if data else None, _Changed(change=change))


def test_an_error_of_a_method_names_the_unit() -> None:
    with pytest.raises(CalibrationError, match=r"'changed' failed on unit 'blocks\.0\.q': ZeroDivisionError"):
        lopro_fx.calibrate(decoder(depth=1)[1], None, _Changed(change=lambda solved: 1 / 0))


def test_shared_and_expanded_tensors_become_the_layer_s_own(tmp_path) -> None:
    size = torch.full((1,), 0.1)

    def shared(solved: Solved) -> Solved:
        layers = [replace(layer, weight=replace(layer.weight, tensors={
            "bits": layer.weight.tensors["bits"], "size": size.expand(layer.weight.shape[0])
        })) for layer in solved.layers]  # fmt: skip
        return replace(solved, layers=tuple(layers))

    _, program = decoder(depth=1)
    state = lopro_fx.calibrate(program, [ids()], _Changed(change=shared))
    sizes = [layer.weight.tensors["size"] for layer in state.layers.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in sizes}) == len(sizes)
    object.__setattr__(state, "config", {"method": "changed"})
    lopro_fx.save_state(state, tmp_path / "state")
    assert torch.equal(lopro_fx.load_state(tmp_path / "state").layers["blocks.0.v"].weight.tensors["size"], sizes[2])


def test_facts_are_not_overwritten_by_metrics() -> None:
    change = _layer(metrics={"shape": [1, 2], "bits_per_weight": 0.0, "format": "zz", "own": 5})
    state = lopro_fx.calibrate(decoder(depth=1)[1], None, _Changed(change=change))
    metrics = state.layers["blocks.0.q"].metrics
    assert (metrics["shape"], metrics["format"], metrics["own"]) == ([32, 32], "sign", 5)
    assert metrics["bits_per_weight"] == 2
