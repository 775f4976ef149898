"""`lopro::cpu_experts` and `lopro::trellis_cpu_experts`: every path of the compiled kernels against the definitions in
ATen and the kernels of single weights, and in packages.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lopro_fx
from lopro_fx.kernels.cpu import native
from lopro_fx.kernels.formats.affine.cpu_experts.reference import cpu_experts
from lopro_fx.kernels.formats.affine.packing.format import group_count, pack
from lopro_fx.kernels.formats.trellis.code import code_words
from lopro_fx.kernels.formats.trellis.cpu_experts.reference import trellis_cpu_experts
from lopro_fx.kernels.rotate.reference import pack_signs
from tests.helpers import TOLERANCE, assert_close, generator, heavy_tailed

ops = torch.ops.lopro
FORMATS = ("affine", "trellis")
# Operators for experts and for one weight, and the definition of the first.
OPERATORS: dict[str, tuple[Any, Any, Callable[..., Tensor]]] = {
    "affine": (ops.cpu_experts.default, ops.cpu_site.default, cpu_experts),
    "trellis": (ops.trellis_cpu_experts.default, ops.trellis_cpu.default, trellis_cpu_experts),
}
SPECS: dict[str, list[dict[str, Any]]] = {
    "affine": [{"bits": bits, "group_size": size} for bits in (2, 3, 4, 8) for size in (32, 64, 128, -1)],
    "trellis": [{"bits": bits, "columns": columns, "window": 14, "strip": strip} for strip in (32, -1)
                for bits, columns in ((2.0, 1), (3.0, 1), (4.0, 1), (1.5, 2), (2.0, 2), (2.5, 2))],
}  # fmt: skip
PACKED = ("codes", "scales", "zeros")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One activation in some thousands lies so close to the middle of two integers that the order of a sum decides.
ROUNDED = 2e-3
# By bits of an activation: a number on the edge of two steps may take either.
SPREAD = {0: 3e-6, 4: 2e-2, 8: ROUNDED}
Operands = dict[str, Any]
RUN = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([run(*x) for x in torch.load(sys.argv[2], weights_only=True)], sys.argv[3])
assert "lopro_fx" not in sys.modules
"""


def weights(format: str, experts: int, out: int, width: int, **spec: Any) -> Operands:
    """Packed weights of experts, random in every bit, and their spec."""
    rng, word = generator(11), torch.iinfo(torch.int32)
    if format == "trellis":
        words = code_words((out, width), round(spec["bits"] * spec["columns"]), spec["columns"], spec["strip"])
        codes = torch.randint(word.min, word.max, (experts, words), generator=rng, dtype=torch.int32)
        return {"codes": codes, "scales": (torch.rand(experts, out, generator=rng) / 8).half(), **spec}
    groups, bits = group_count(width, spec["group_size"]), spec["bits"]
    return {
        "codes": pack(torch.randint(0, 1 << bits, (experts, out, width), generator=rng), bits),
        "scales": (torch.rand(experts, out, groups, generator=rng) / (1 << bits)).half(),
        "zeros": pack(torch.randint(0, 1 << bits, (experts, out * groups), generator=rng), bits),
        **spec,
    }


def rotation(width: int, block: int = 1, skip: int = 0, permuted: bool = False) -> Operands:
    rng = generator(12)
    return {
        "perm": torch.randperm(width, generator=rng).to(torch.int16) if permuted else None,
        "signs": pack_signs(torch.randint(0, 2, (width,), generator=rng) * 2 - 1) if block > 1 else None,
        "block": block, "skip": skip,
    }  # fmt: skip


def branches(
    experts: int, out: int, width: int, rank: int = 0, grid: tuple[int, int] | None = None, cored: bool = False,
    factor_bits: int = 8,
) -> Operands:  # fmt: skip
    """Low-rank branches, whose factors lie in a grid of rows and columns, or are each expert's own."""
    rng, (rows, columns) = generator(13), grid or (experts, experts)
    named: Operands = dict.fromkeys(("down", "down_scale", "up", "up_scale", "cells", "core"))
    if not rank:
        return named
    if factor_bits == 16:
        named["down"] = (torch.randn(rows * rank, width, generator=rng) / 8).half()
        named["up"] = (torch.randn(columns, out, rank, generator=rng) / 8).half()
    else:
        named["down"] = torch.randint(-127, 128, (rows * rank, width), generator=rng, dtype=torch.int8)
        named["up"] = torch.randint(-127, 128, (columns, out, rank), generator=rng, dtype=torch.int8)
        named["down_scale"] = (torch.rand(rows * rank, generator=rng) / 500).half()
        named["up_scale"] = (torch.rand(columns, rank, generator=rng) / 500).half()
    if grid:
        places = [torch.randint(0, count, (experts,), generator=rng) for count in grid]
        named["cells"] = torch.stack(places, 1).to(torch.int32)
    if cored:
        named["core"] = torch.randn(experts, rank, rank, generator=rng).half() / rank**0.5
    return named


def route(tokens: int, slots: int, experts: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, experts, (tokens * slots,), generator=generator(14)).to(dtype)


def compare(format: str, x: Tensor, ids: Tensor, slots: int, named: Operands, act_bits: int) -> None:
    operator, _, defined = OPERATORS[format]
    expected, got = (run(x=x, ids=ids, slots=slots, act_bits=act_bits, **named) for run in (defined, operator))
    assert got.dtype == x.dtype
    assert_close(f"{tuple(x.shape)}", expected, got, max(SPREAD[act_bits], 2 * TOLERANCE[x.dtype]))


def each_alone(format: str, x: Tensor, ids: Tensor, slots: int, named: Operands, **rounding: int) -> Tensor:
    """The operator for one weight, on the rows of each expert."""
    site = OPERATORS[format][1]
    y = x.new_empty(len(ids), named["scales"].shape[1])
    for expert in range(named["scales"].shape[0]):
        own: Operands = {key: value for key, value in named.items() if key not in ("cells", "core")}
        own |= {key: named[key][expert] for key in PACKED if key in named}
        cells = named["cells"]
        row, column = (expert, expert) if cells is None else cells[expert].tolist()
        for name, place in (("down", row), ("down_scale", row), ("up", column), ("up_scale", column)):
            if (factor := named[name]) is not None:
                factor = factor.unflatten(0, (-1, named["up"].shape[2])) if name.startswith("down") else factor
                own[name] = factor[place]
        rows = (ids == expert).nonzero().flatten()
        y[rows] = site(x=x[rows // slots], bias=None, **rounding, **own)
    return y


@pytest.fixture(params=native.PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each path of the kernel that this processor has."""
    if not native.load():
        pytest.skip("no C++ compiler built the kernel")
    with native.forced(request.param) as found:
        if not found:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


@pytest.fixture(scope="module")
def compiled() -> None:
    if not native.load():
        pytest.skip("no C++ compiler built the kernel")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("act_bits", [0, 8])
def test_paths_equal_the_definition(path: str, format: str, act_bits: int) -> None:
    """Of every spec; some experts have one row, some few, some many, and some none."""
    ids = torch.tensor([0] * 3 + [2] * 20 + [4] + [5] * 9)[torch.randperm(33, generator=generator())]
    for spec in SPECS[format]:
        named = {**weights(format, 7, 70, 192, **spec), **rotation(192, 64), **branches(7, 70, 192)}
        compare(format, heavy_tailed(33, 192), ids, 1, named, act_bits)
        compare(format, heavy_tailed(11, 192), ids, 3, named, act_bits)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4, 60])
def test_every_operand(path: str, format: str, dtype: torch.dtype, tokens: int) -> None:
    x, ids = heavy_tailed(tokens, 576).to(dtype), route(tokens, 2, 6, torch.int32)
    packed = weights(format, 6, 50, 576, **SPECS[format][1])
    grids: tuple[Operands, ...] = ({}, {"grid": (2, 3)}, {"grid": (2, 3), "cored": True},
                                   {"cored": True, "factor_bits": 16})  # fmt: skip
    for options in grids:
        named = {**packed, **rotation(576, 64, 64, True), **branches(6, 50, 576, 19, **options)}
        for act_bits in (0, 4, 8):
            compare(format, x, ids, 2, named, act_bits)


@settings(max_examples=60)
@given(st.data())
def test_any_shape(compiled: None, data: st.DataObject) -> None:
    """As the definition without rounding; with it too, as the kernel of one weight on the rows of each expert."""
    format = data.draw(st.sampled_from(FORMATS), "format")
    block = 1 << data.draw(st.integers(0, 7), "log2 of the block")
    skip = data.draw(st.integers(0, 40), "skip") if block > 1 else 0
    width = skip + block * data.draw(st.integers(1, max(1, 300 // block)), "blocks")
    tokens, slots = data.draw(st.sampled_from([0, 1, 2, 7, 30]), "tokens"), data.draw(st.integers(1, 4), "slots")
    experts, out = data.draw(st.integers(1, 9), "experts"), data.draw(st.integers(1, 70), "rows of a weight")
    grid = data.draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)), "grid")
    rank, cored = data.draw(st.integers(0, 20), "rank"), data.draw(st.booleans(), "core")
    named = {
        **weights(format, experts, out, width, **data.draw(st.sampled_from(SPECS[format]), "spec")),
        **rotation(width, block, skip, data.draw(st.booleans(), "permuted")),
        **branches(experts, out, width, rank, grid, cored, data.draw(st.sampled_from([8, 16]), "bits of factors")),
    }
    ids = route(tokens, slots, experts, data.draw(st.sampled_from([torch.int64, torch.int32]), "type of ids"))
    x = torch.randn(tokens, width, generator=generator()).to(data.draw(st.sampled_from(DTYPES), "type of x"))
    with native.forced(data.draw(st.sampled_from(native.PATHS), "path")):
        compare(format, x, ids, slots, named, 0)
        if not rank or not cored:
            for act_bits, act_group in ((0, 0), (8, 0), (8, -1), (4, 64)):
                rounding = {"act_bits": act_bits, "act_group": act_group}
                got = OPERATORS[format][0](x=x, ids=ids, slots=slots, **rounding, **named)
                assert torch.equal(got, each_alone(format, x, ids, slots, named, **rounding))


@pytest.mark.parametrize("format", FORMATS)
def test_threads_agree(path: str, format: str) -> None:
    named = {**weights(format, 5, 300, 256, **SPECS[format][1]), **rotation(256, 64), **branches(5, 300, 256, 4)}
    before = torch.get_num_threads()
    for tokens in (1, 4, 30):
        x, ids, results = heavy_tailed(tokens, 256), route(tokens, 3, 5), []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(OPERATORS[format][0](x=x, ids=ids, slots=3, act_bits=8, **named))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("format", FORMATS)
def test_many_experts_of_few_rows(path: str, format: str) -> None:
    """More rows than the sites of one parallel region may share."""
    named = {**weights(format, 64, 33, 96, **SPECS[format][0]), **rotation(96, 32), **branches(64, 33, 96, 3, (4, 16))}
    x, ids = heavy_tailed(96, 96), route(96, 3, 64)
    assert torch.equal(OPERATORS[format][0](x=x, ids=ids, slots=3, act_bits=8, **named),
                       each_alone(format, x, ids, 3, named, act_bits=8))  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_output_is_written_in_full(path: str, poisoned_memory: None, format: str) -> None:
    named = {**weights(format, 3, 37, 96, **SPECS[format][0]), **rotation(96), **branches(3, 37, 96, 2, cored=True)}
    for tokens in (1, 6, 40):
        y = OPERATORS[format][0](x=torch.ones(tokens, 96), ids=route(tokens, 2, 3), slots=2, act_bits=8, **named)
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("format", FORMATS)
def test_any_layout_of_activation_and_ids(path: str, format: str) -> None:
    named = {**weights(format, 4, 20, 64, **SPECS[format][0]), **rotation(64, 32), **branches(4, 20, 64, 3)}
    wide, ids = torch.randn(12, 128, generator=generator()), route(12, 4, 4)
    across = wide.T.contiguous().T
    for x in (wide[::2, ::2], wide[::2, 64:], wide[:1, :64].expand(6, 64), across[::2, :64], wide[:0, :64]):
        compare(format, x, ids[: 4 * len(x) : 2], 2, named, 0)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_shows_where_it_belongs(path: str, format: str) -> None:
    named = {**weights(format, 4, 45, 96, **SPECS[format][0]), **rotation(96, 32), **branches(4, 45, 96, 3)}
    named["scales"][2, 9] = float("nan")
    for tokens in (1, 4, 40):
        x, ids = heavy_tailed(tokens, 96), route(tokens, 4, 4)
        x[0, 5] = float("inf")
        finite = torch.isfinite(OPERATORS[format][0](x=x, ids=ids, slots=4, act_bits=8, **named))
        assert not finite[:4].any()
        want = torch.ones_like(finite)
        want[:4] = False
        want[ids == 2, 9] = False
        assert torch.equal(finite, want)


WRONG: dict[str, tuple[str, Operands]] = {
    "expert below": ("ids holds", {"ids": torch.tensor([0, 1, -1, 2])}),
    "expert above": ("ids holds", {"ids": torch.tensor([0, 1, 3, 2])}),
    "expert far above": ("ids holds", {"ids": torch.tensor([0, 1, 1 << 62, 2])}),
    "int32 expert below": ("ids holds", {"ids": torch.tensor([0, 1, -(1 << 31), 2], dtype=torch.int32)}),
    "type of ids": ("ids is not", {"ids": torch.tensor([0, 1, 0, 2], dtype=torch.int16)}),
    "few ids": ("ids doesn't", {"ids": torch.tensor([0, 1, 0])}),
    "ids as a matrix": ("ids doesn't", {"ids": torch.tensor([[0, 1], [0, 2]])}),
    "no slots": ("ids doesn't", {"slots": 0}),
    "negative slots": ("ids doesn't", {"slots": -2}),
    "many slots": ("ids doesn't", {"slots": 1 << 62}),
    "x as a vector": ("x is not a matrix", {"x": torch.ones(96)}),
    "x of 3 dimensions": ("x is not a matrix", {"x": torch.ones(1, 2, 96)}),
    "columns of x": ("codes|scales", {"x": torch.ones(2, 160)}),
    "type of x": ("x is", {"x": torch.ones(2, 96).double()}),
    "activation bits": ("act_bits", {"act_bits": 5}),
    "row of a cell": ("cells holds", {"cells": torch.tensor([[0, 0], [2, 0], [1, 1]], dtype=torch.int32)}),
    "column of a cell": ("cells holds", {"cells": torch.tensor([[0, 0], [1, 0], [1, -1]], dtype=torch.int32)}),
    "type of cells": ("cells is not", {"cells": torch.zeros(3, 2, dtype=torch.int64)}),
    "few cells": ("cells has", {"cells": torch.zeros(2, 2, dtype=torch.int32)}),
    "no cells": ("down or up", {"cells": None}),
    "rows of down": ("rank", {"down": torch.ones(9, 96, dtype=torch.int8)}),
    "columns of down": ("down doesn't", {"down": torch.ones(8, 64, dtype=torch.int8)}),
    "type of down": ("down or up is not", {"down": torch.ones(8, 96)}),
    "up as a matrix": ("down has", {"up": torch.ones(20, 4, dtype=torch.int8)}),
    "rows of up": ("up doesn't", {"up": torch.ones(2, 21, 4, dtype=torch.int8)}),
    "scales of down": ("down_scale", {"down_scale": torch.ones(4).half()}),
    "scales of up": ("up_scale", {"up_scale": torch.ones(4).half()}),
    "core": ("core doesn't", {"core": torch.ones(2, 4, 4).half()}),
    "type of core": ("core is not", {"core": torch.ones(3, 4, 4)}),
    "one weight's scales": ("scales", {"scales": torch.ones(20).half()}),
    "scales of fewer experts": ("scales|codes", {"scales": torch.ones(2, 20, 3).half()}),
    "permutation": ("perm", {"perm": torch.full((96,), 96, dtype=torch.int16)}),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_operands_are_refused(compiled: None, format: str, wrong: str) -> None:
    named = {**weights(format, 3, 20, 96, **SPECS[format][0]), **rotation(96),
             **branches(3, 20, 96, 4, (2, 2), cored=True), "x": torch.ones(2, 96), "ids": torch.tensor([0, 1, 0, 2]),
             "slots": 2, "act_bits": 8}  # fmt: skip
    OPERATORS[format][0](**named)
    match, changes = WRONG[wrong]
    with pytest.raises(ValueError, match=match):
        OPERATORS[format][0](**{**named, **changes})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", PACKED)
def test_weights_of_fewer_experts_are_refused(compiled: None, format: str, name: str) -> None:
    named = {**weights(format, 3, 20, 96, **SPECS[format][0]), **rotation(96), **branches(3, 20, 96)}
    if name not in named:
        return
    named[name] = named[name][:2]
    with pytest.raises(ValueError, match="doesn't fit"):
        OPERATORS[format][0](x=torch.ones(2, 96), ids=torch.tensor([0, 1]), slots=1, act_bits=0, **named)


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format: str) -> None:
    operator = OPERATORS[format][0]
    for factors in (branches(3, 20, 96, 4, (2, 2), cored=True), branches(3, 20, 96)):
        named = {**weights(format, 3, 20, 96, **SPECS[format][0]), **rotation(96, 32), **factors,
                 "x": torch.ones(2, 96), "ids": torch.tensor([0, 1, 0, 2]), "slots": 2, "act_bits": 8,
                 "act_group": 64}  # fmt: skip
        torch.library.opcheck(operator, tuple(named[argument.name] for argument in operator._schema.arguments))


class Mixture(torch.nn.Module):
    """All operators for CPUs: a weight in the format "affine" routes to experts in both; one in "trellis" follows."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, Operands] = {}
        one = {"block": 32, "skip": 0, "act_bits": 8, "perm": None, "bias": None, "down": None, "down_scale": None,
               "up": None, "up_scale": None}  # fmt: skip
        for name, format, experts, options in (
            ("router", "affine", 0, one), ("first", "affine", 5, {**branches(5, 96, 96, 4, (2, 3)), "act_bits": 8}),
            ("second", "trellis", 5, {**branches(5, 96, 96, 4, cored=True), "act_bits": 8}),
            ("last", "trellis", 0, one),
        ):  # fmt: skip
            packed = weights(format, max(experts, 1), 5 if name == "router" else 96, 96, **SPECS[format][1])
            named = {**rotation(96, 32), **(packed if experts else _first(packed)), **options}
            for key, value in named.items():
                if isinstance(value, Tensor):
                    self.register_buffer(f"{name}_{key}", value)
            self.specs[name] = named

    def forward(self, x: Tensor) -> Tensor:
        ids = ops.cpu_site(x=x, **self.operands("router")).topk(2).indices.flatten()
        hidden = ops.cpu_experts(x=x, ids=ids, slots=2, **self.operands("first"))
        hidden = ops.trellis_cpu_experts(x=hidden, ids=ids, slots=1, **self.operands("second"))
        return ops.trellis_cpu(x=hidden.unflatten(0, (-1, 2)).sum(1), **self.operands("last"))

    def operands(self, name: str) -> Operands:
        return {key: getattr(self, f"{name}_{key}", value) for key, value in self.specs[name].items()}


def _first(packed: Operands) -> Operands:
    return {key: value[0] if isinstance(value, Tensor) else value for key, value in packed.items()}


def test_package_runs_without_lopro_fx(compiled: None, tmp_path) -> None:
    module, batch = Mixture(), torch.export.Dim("batch", max=64)
    program = torch.export.export(module, (heavy_tailed(7, 96),), dynamic_shapes={"x": {0: batch}})
    found = [node.target for node in program.graph.nodes if "lopro" in str(node.target)]
    assert found == [ops.cpu_site.default, ops.cpu_experts.default, ops.trellis_cpu_experts.default,
                     ops.trellis_cpu.default]  # fmt: skip
    lopro_fx.export_aoti(program, tmp_path / "model.pt2")
    inputs = [(heavy_tailed(count, 96),) for count in (1, 3, 40)]
    torch.save(inputs, tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "outputs.pt")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *files], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    for (x,), got in zip(inputs, torch.load(tmp_path / "outputs.pt", weights_only=True), strict=True):
        assert_close(f"{len(x)} tokens", module(x), got, ROUNDED)
