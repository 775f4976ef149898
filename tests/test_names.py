"""Modules of every name that torch.export takes go through everything that a program goes through."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx import RTN, LoPRo
from lopro_fx.layer import dense_weight
from lopro_fx.state import state_of
from tests.helpers import assert_close, generator
from tests.programs import seeded

WIDTH = 32
CONFIG = LoPRo(bits=4, group_size=32, rank=1, clip_steps=2, refits=0, sweeps=0)
LONG = "m" * 300


class Named(nn.Module):
    """Two Linears that read different tensors, a third that reads the first's, in modules of the given names."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({one: nn.Linear(WIDTH, WIDTH), other: nn.Linear(WIDTH, WIDTH)})
        self.outside = nn.Linear(WIDTH, WIDTH)
        self.names = one, other

    def forward(self, x: Tensor) -> Tensor:
        one, other = (self.inside[name] for name in self.names)
        return other(torch.relu(one(x))) + self.outside(x)


def _x(seed: int = 0) -> Tensor:
    return torch.randn(4, WIDTH, generator=generator(seed))


def _run(program: ExportedProgram) -> Tensor:
    with torch.no_grad():
        return program.module()(_x())


def _runs(program: ExportedProgram, module: nn.Module) -> bool:
    """Whether torch runs the program that it exported: it makes source of the names, which some of them break."""
    with contextlib.suppress(SyntaxError, AttributeError, ValueError):
        return torch.equal(_run(program), module(_x()))
    return False


def _quantised(program: ExportedProgram, module: nn.Module) -> tuple[lopro_fx.QuantState, Tensor]:
    """A state, calibrated with a journal that is read once, and what the dense weights that it stands for compute."""
    with tempfile.TemporaryDirectory() as folder:
        first, state = (lopro_fx.calibrate(program, [_x()], CONFIG, resume=folder) for _ in range(2))
        files = [file.name for file in Path(folder).iterdir()]
        assert len({name.casefold() for name in files}) == len(files) == 1 + len(state.inputs)
        for name, site in first.layers.items():
            assert torch.equal(site.tensors["codes"], state.layers[name].tensors["codes"])
            # Only what was read, and not solved again, has the same time.
            assert site.metrics == state.layers[name].metrics
        lopro_fx.save_state(state, Path(folder) / "state")
        state = lopro_fx.load_state(Path(folder) / "state")
    with torch.no_grad():
        for name, site in state.layers.items():
            module.get_submodule(name).weight.copy_(dense_weight(state.inputs[site.input], site))
        return state, module(_x())


NAMES = st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=4)
@given(NAMES, NAMES)
@example("en-US", "en_US")
@example("Q", "q")
@example("a/b", "a b")
@example("../../up", "~")
@example("a,b;c", "a(b[c")
@example("it's", "%2C")
@example("日本", "naïve 😀")
@example("class", "a\\8")
@example('a"b', "a\\b")
@example("\n", "\0")
@example(LONG, LONG + "n")
@example("lopro_fx", "codes")
@example("constant:x", "example:0")
@example("*", "[a]")
def test_every_name_that_export_takes_is_taken(one: str, other: str) -> None:
    assume(one != other)
    try:
        module = seeded(Named(one, other))
        program = torch.export.export(module, (_x(),), strict=False)
    except (KeyError, ValueError, AttributeError, SyntaxError):
        assume(False)
    runs = _runs(program, module)
    state, expected = _quantised(program, module)
    assert set(state.layers) == {f"inside.{one}", f"inside.{other}", "outside"}
    result = lopro_fx.apply(program, state)
    again = state_of(result)
    assert all(
        torch.equal(again.layers[name].tensors["scales"], site.tensors["scales"]) for name, site in state.layers.items()
    )
    fast = lopro_fx.optimize(result, target="cpu", activations="float")
    assert {row["name"] for row in lopro_fx.report(fast).rows} == set(state.layers)
    if not runs:
        return
    with tempfile.TemporaryDirectory() as folder:
        lopro_fx.save(fast, Path(folder) / "program")
        loaded = lopro_fx.load(Path(folder) / "program")
    for ran in (result, fast, loaded):
        assert_close(f"{one!r}, {other!r}", expected, _run(ran), 1e-5)
    assert torch.equal(torch.export.unflatten(loaded)(_x()), _run(loaded))
    stacks = [[node.meta.get("nn_module_stack") for node in each.graph.nodes if node.op == "call_function"]
              for each in (fast, loaded)]  # fmt: skip
    assert stacks[0] == stacks[1]


@pytest.mark.parametrize("key", ["codes", "scales", "up", "down", "signs", "input", "merged", "weight_"])
def test_a_linear_may_have_modules_named_like_packed_tensors(key: str) -> None:
    class Adapted(nn.Linear):
        """A Linear with a low-rank branch of its own, as adapters have."""

        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)
            self.add_module(key, nn.Linear(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.get_submodule(key)(torch.tanh(x))

    module = seeded(nn.Sequential(Adapted(), nn.ReLU(), nn.Linear(WIDTH, WIDTH)))
    program = torch.export.export(module, (_x(),), strict=False)
    state, expected = _quantised(program, module)
    result = lopro_fx.apply(program, state)
    assert lopro_fx.report(result).packed_bytes == state.packed_bytes == state_of(result).packed_bytes
    with tempfile.TemporaryDirectory() as folder:
        lopro_fx.save(lopro_fx.optimize(result), Path(folder) / "program")
        loaded = lopro_fx.load(Path(folder) / "program")
    for ran in (result, loaded):
        assert_close(key, expected, _run(ran), 1e-5)


def test_parameters_may_be_named_like_modules() -> None:
    """The packed tensors of `w` lie in a module `w`; a parameter of that name that stays has it first."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.w_ = nn.Parameter(torch.empty(WIDTH, WIDTH)), nn.Parameter(torch.empty(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.w.T) @ self.w_.T * self.w.norm()

    module = seeded(Bare())
    program = torch.export.export(module, (_x(),), strict=False)
    norm = module.w.norm().item()
    state = lopro_fx.calibrate(program, None, RTN(bits=8, group_size=32))
    result = lopro_fx.apply(program, state)
    with torch.no_grad():
        first, last = (dense_weight(state.inputs[site.input], site)
                       for site in (state.layers["w"], state.layers["w_"]))  # fmt: skip
        expected = torch.relu(_x() @ first.T) @ last.T * norm
        assert_close("output", expected, _run(result), 1e-5)
        assert result.state_dict["w"].norm().item() == norm
        assert "w_" not in result.state_dict


def test_a_package_of_modules_with_odd_names_computes_the_same(tmp_path: Path) -> None:
    module = seeded(Named("en-US", "it's a/b, (ü)"))
    program = torch.export.export(module, (_x(),), strict=False)
    fast = lopro_fx.optimize(lopro_fx.quantize(program, [_x()], CONFIG), target="cpu", activations="float")
    try:
        lopro_fx.export_aoti(fast, tmp_path / "model.pt2")
    except lopro_fx.GraphError as error:
        pytest.skip(f"no compiler: {error}")
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    with torch.no_grad():
        assert_close("package", _run(fast), loaded(_x()), 1e-5)


@pytest.mark.parametrize("name", ["en-US", LONG, "a,b;(c"])
def test_torch_saves_and_loads_what_it_could_before(name: str) -> None:
    module = seeded(Named(name, "other"))
    program = torch.export.export(module, (_x(),), strict=False)
    result = lopro_fx.quantize(program, [_x()], CONFIG)
    kept = []
    for each in (program, result):
        file = io.BytesIO()
        torch.export.save(each, file)
        file.seek(0)
        try:
            kept.append(torch.equal(_run(torch.export.load(file)), _run(each)))
        except RuntimeError:
            kept.append(False)
    assert kept[0] == kept[1]
