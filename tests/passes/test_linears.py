"""One form for a Linear, however a model spells it: found, quantised and run as what it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

import lopro_fx
from lopro_fx import LoPRo
from lopro_fx.layer import dense_weight
from lopro_fx.passes.linears import as_linears
from lopro_fx.passes.sites import find_sites
from tests.helpers import assert_close, generator
from tests.programs import seeded

IN, OUT = 32, 16
CONFIG = LoPRo(bits=4, group_size=32, rank=2, clip_steps=4, refits=0, sweeps=0)


class Spelled(nn.Module):
    """A Linear, what `call(x, W, b)` makes of its result, and a Linear that reads that."""

    def __init__(self, call: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(IN, IN), nn.Linear(OUT, OUT)
        self.middle = nn.Module()
        self.middle.weight, self.bias = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(OUT))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.call(torch.tanh(self.first(x)), self.middle.weight, self.bias)))


@dataclass(frozen=True)
class Spelling:
    """`rank`: dimensions of the activation."""

    call: Callable[..., Tensor]
    shape: tuple[int, ...] = (OUT, IN)
    rank: int = 3


def _conv1d(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b, x.view(-1, x.size(-1)), w).view(*x.shape[:-1], w.shape[1])


TURNED = (IN, OUT)
TAKEN = {
    "x @ W.T": Spelling(lambda x, w, b: x @ w.T),
    "x @ W.T + b": Spelling(lambda x, w, b: x @ w.T + b),
    "matmul(x, W.t())": Spelling(lambda x, w, b: torch.matmul(x, w.t())),
    "x @ W.mT": Spelling(lambda x, w, b: x @ w.mT),
    "x @ W.transpose": Spelling(lambda x, w, b: x @ w.transpose(-1, -2)),
    "x @ W.permute": Spelling(lambda x, w, b: x @ w.permute(1, 0)),
    "x @ W.t().contiguous()": Spelling(lambda x, w, b: x @ w.t().contiguous()),
    "x @ W": Spelling(lambda x, w, b: x @ w, TURNED),
    "vector @ W.T": Spelling(lambda x, w, b: x[0, 0] @ w.T),
    "mm": Spelling(lambda x, w, b: torch.mm(x, w.t()), rank=2),
    "mm of a view": Spelling(lambda x, w, b: torch.mm(x.view(-1, IN), w.permute(1, 0))),
    "mv": Spelling(lambda x, w, b: torch.mv(w, x[0, 0])),
    "addmm": Spelling(lambda x, w, b: torch.addmm(b, x, w.t()), rank=2),
    "addmm with a row": Spelling(lambda x, w, b: torch.addmm(b[None], x, w.t()), rank=2),
    "addmm with a number": Spelling(lambda x, w, b: torch.addmm(b[:1], x, w.t()), rank=2),
    "addmm of a residual": Spelling(lambda x, w, b: torch.addmm(x[:, :OUT], x, w.t()), rank=2),
    "Conv1D": Spelling(_conv1d, TURNED),
    "einsum oi": Spelling(lambda x, w, b: torch.einsum("bsi,oi->bso", x, w)),
    "einsum io": Spelling(lambda x, w, b: torch.einsum("bsi,io->bso", x, w), TURNED),
    "einsum, weight first": Spelling(lambda x, w, b: torch.einsum("oi, ...i -> ...o", w, x)),
    "einsum of a transpose": Spelling(lambda x, w, b: torch.einsum("bsi,io->bso", x, w.T)),
    "tensordot": Spelling(lambda x, w, b: torch.tensordot(x, w, ([-1], [1]))),
    "tensordot io": Spelling(lambda x, w, b: torch.tensordot(x, w, ([2], [0])), TURNED),
    "inner": Spelling(lambda x, w, b: torch.inner(x, w)),
    "W @ x": Spelling(lambda x, w, b: (w @ x.transpose(-1, -2)).transpose(-1, -2)),
    "W.T @ x": Spelling(lambda x, w, b: (w.T @ x.mT).mT, TURNED),
    "W @ x and a view": Spelling(lambda x, w, b: (w @ x.mT).view(x.shape[0], OUT, -1).mT),
    "linear(x, W.T)": Spelling(lambda x, w, b: functional.linear(x, w.T, b), TURNED),
    "linear(x, view)": Spelling(lambda x, w, b: functional.linear(x, w.view(OUT, 2, 16).view(OUT, IN), b)),
    "linear(x, W[:])": Spelling(lambda x, w, b: functional.linear(x, w[:], b)),
    "linear(x, W.to(x.dtype))": Spelling(lambda x, w, b: functional.linear(x, w.to(x.dtype), b)),
    "linear(x, W.clone())": Spelling(lambda x, w, b: functional.linear(x, w.clone(), b)),
    "linear(x, W.T.T)": Spelling(lambda x, w, b: functional.linear(x, w.T.T, b)),
    "twice": Spelling(lambda x, w, b: x @ w.T + torch.einsum("bsi,oi->bso", x * 2, w) + functional.linear(-x, w, b)),
}
LEFT = {
    "a slice": Spelling(lambda x, w, b: functional.linear(x, w[:OUT]), (3 * OUT, IN)),
    "narrow": Spelling(lambda x, w, b: x @ w.narrow(0, OUT, OUT).T, (3 * OUT, IN)),
    "chunks": Spelling(lambda x, w, b: sum(functional.linear(x, part) for part in w.chunk(3)), (3 * OUT, IN)),
    "split": Spelling(lambda x, w, b: sum(x @ part.T for part in w.split(OUT)), (3 * OUT, IN)),
    "another shape": Spelling(lambda x, w, b: x @ w.view(IN, OUT)),
    "another order": Spelling(lambda x, w, b: functional.linear(x, w.unflatten(1, (2, 16)).transpose(1, 2).flatten(1))),
    "addmm, scaled": Spelling(lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.5), rank=2),
    "einsum, features first": Spelling(lambda x, w, b: torch.einsum("bsi,oi->bos", x, w).mT),
    "einsum of a repeated feature": Spelling(lambda x, w, b: torch.einsum("bsi,oi->bso", x[..., :1], w)),
    "einsum, two contracted": Spelling(lambda x, w, b: torch.einsum("bsi,bi->bs", x[:OUT], w)[..., None] * b, (2, IN)),
    "both forms": Spelling(lambda x, w, b: (functional.linear(x, w) @ w)[..., :OUT]),
    "whole and in part": Spelling(lambda x, w, b: functional.linear(x, w) + functional.linear(x, w[:1])),
    "of two parameters": Spelling(lambda x, w, b: x @ (w[:4].T @ w[:4] + w.T @ w)[:, :OUT]),
}  # fmt: skip


def _x(rank: int, seed: int = 0) -> Tensor:
    return torch.randn((2, 5, IN)[-rank:], generator=generator(seed))


def _export(module: nn.Module, x: Tensor) -> ExportedProgram:
    free = {dim: Dim(f"size{dim}", min=1) for dim in range(x.dim() - 1)}
    return torch.export.export(module, (x,), dynamic_shapes=(free,), strict=False)


def _run(program: ExportedProgram, *args: Any) -> Tensor:
    with torch.no_grad():
        return program.module()(*args)


@pytest.mark.parametrize("name", [*TAKEN, *LEFT])
def test_the_program_computes_the_same_with_linears(name: str) -> None:
    case = (TAKEN | LEFT)[name]
    module, x = seeded(Spelled(case.call, case.shape)), _x(case.rank)
    dynamic = name != "einsum, two contracted"
    program = _export(module, x) if dynamic else torch.export.export(module, (x,), strict=False)
    before = str(program)
    flat = as_linears(program)
    assert str(program) == before
    assert as_linears(flat) is flat
    for inputs in (x, _x(case.rank, 1)[: 1 if dynamic and case.rank == 3 else None]):
        with torch.no_grad():
            assert_close(name, module(inputs), _run(flat, inputs), 1e-6)


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_quantised_computes_with_the_packed_weight(name: str) -> None:
    case = TAKEN[name]
    module, x = seeded(Spelled(case.call, case.shape)), _x(case.rank)
    program = _export(module, x)
    lines = {line.name: line for line in lopro_fx.explain(program).taken}
    assert set(lines) == {"first", "middle", "last"}
    assert lines["middle"].shape == (OUT, IN)
    state = lopro_fx.calibrate(program, [_x(case.rank, seed) for seed in range(6)], CONFIG)
    quantised = lopro_fx.apply(program, state)
    twin = seeded(Spelled(case.call, case.shape))
    for site in state.layers.values():
        dense = dense_weight(state.inputs[site.input], site)
        stored = dense.T if site.name == "middle" and case.shape == TURNED else dense
        twin.get_submodule(site.name).weight = nn.Parameter(stored)
    with torch.no_grad():
        assert_close(name, twin(x), _run(quantised, x), 1e-5)
        assert not torch.equal(twin(x), module(x))
    assert not [fqn for fqn in quantised.state_dict if fqn.endswith(("first.weight", "middle.weight", "last.weight"))]
    native = lopro_fx.optimize(quantised, target="cpu", activations="float")
    assert_close(f"{name}, for CPUs", _run(quantised, x), _run(native, x), 1e-5)


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_taken_is_listed_and_kept(name: str) -> None:
    case = LEFT[name]
    module, x = seeded(Spelled(case.call, case.shape)), _x(case.rank)
    program = torch.export.export(module, (x,), strict=False)
    explanation = lopro_fx.explain(program)
    assert {line.name for line in explanation.taken} == {"first", "last"}
    assert "middle" in {line.name for line in explanation.skipped}
    assert all(line.reason for line in explanation.skipped)
    quantised = lopro_fx.quantize(program, [x], LoPRo(bits=8, group_size=32, rank=0, clip_steps=4))
    with torch.no_grad():
        assert_close(name, module(x), _run(quantised, x), 0.05)


def test_what_follows_is_measured_on_the_packed_weight() -> None:
    """Also where the weight is stored transposed, or read through several views."""
    module = seeded(Spelled(lambda x, w, b: _conv1d(x, w, b) + torch.einsum("bsi,io->bso", x, w), TURNED))
    config = LoPRo(bits=3, group_size=32, rank=1, clip_steps=4, token_clip=0, asymmetry=0)
    x = [_x(3, seed) for seed in range(6)]
    state = lopro_fx.calibrate(_export(module, x[0]), x, config)
    twin, last = copy.deepcopy(module), state.layers["last"]
    for site in (state.layers["first"], state.layers["middle"]):
        dense = dense_weight(state.inputs[site.input], site)
        twin.get_submodule(site.name).weight = nn.Parameter(dense.T if site.name == "middle" else dense)
    twin.last = nn.Identity()
    with torch.no_grad():
        read = torch.cat([twin(batch).flatten(0, -2) for batch in x]).double()
    weight = module.last.weight.double()
    error = dense_weight(state.inputs["last"], last).double() - weight
    gram = read.T @ read
    # What is assumed of directions that few tokens show (methods/prior.py) counts in the reported loss.
    gram.diagonal().add_((read.shape[1] / read.shape[0]) ** 2 * gram.diagonal().mean())
    relative = (error @ gram * error).sum() / (weight @ gram * weight).sum()
    assert last.metrics["relative_loss"] == pytest.approx(relative.item(), rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_of_the_weight_are_seen_through(dtype: torch.dtype) -> None:
    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (x.to(dtype) @ w.to(dtype).T).float() + functional.linear(x, w.to(torch.float32))

    module, x = seeded(Spelled(call, (OUT, IN))), _x(3)
    program = _export(module, x)
    state = lopro_fx.calibrate(program, [x], CONFIG)
    assert set(state.layers) == {"first", "middle", "last"}
    quantised = lopro_fx.apply(program, state)
    assert "middle.weight" not in quantised.state_dict
    for site in state.layers.values():
        module.get_submodule(site.name).weight = nn.Parameter(dense_weight(state.inputs[site.input], site))
    with torch.no_grad():
        assert_close("output", module(x), _run(quantised, x), 2e-2 if dtype is torch.bfloat16 else 2e-3)


def test_products_that_read_one_tensor_form_a_group() -> None:
    class Falcon(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(IN, OUT), nn.Linear(IN, OUT), nn.Linear(IN, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.q.weight.T + torch.inner(x, self.k.weight) * self.v(x)

    program = _export(seeded(Falcon()), _x(3))
    assert [[site.name for site in group.sites] for group in find_sites(as_linears(program)).groups] == [
        ["q", "k", "v"]
    ]


def test_a_router_or_head_is_kept_in_every_spelling() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(50, IN), nn.Linear(IN, IN)
            self.gate, self.router = nn.Linear(IN, 1), nn.Linear(IN, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.body(self.embed(ids))
            chosen = (x @ self.router.weight.T).softmax(-1).topk(2)[0].sum(-1, keepdim=True)
            return (x * chosen * (x @ self.gate.weight.T).sigmoid()) @ self.embed.weight.T

    program = torch.export.export(seeded(Model()), (torch.arange(6)[None],), strict=False)
    selection = find_sites(as_linears(program))
    assert [site.name for site in selection.sites] == ["body"]
    assert {item.name for item in selection.skipped} == {"router", "gate", "embed"}
    state = lopro_fx.calibrate(program, [torch.arange(6)[None]], LoPRo(bits=8, group_size=32, rank=0, head_bits=8))
    assert set(state.layers) == {"body", "embed"}
    quantised = lopro_fx.apply(program, state)
    assert "embed.weight" not in quantised.state_dict
    ids = torch.arange(20).view(2, 10)[:1, :6]
    assert_close("logits", _run(program, ids), _run(quantised, ids), 0.05)


def test_tables_and_caches_are_no_weights() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(IN, IN)
            self.register_buffer("table", torch.ones(IN, IN), persistent=False)
            self.register_buffer("inverse", torch.ones(IN), persistent=False)
            self.register_buffer("cache", torch.ones(4, IN), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            self.cache.copy_(self.cache + y.sum((0, 1)))
            angles = self.inverse[None, :, None].expand(2, -1, 1) @ y[:, :1, :1]
            return (y @ self.table.T + angles.mT) @ self.cache.T + functional.linear(y, self.cache)

    program = torch.export.export(seeded(Model()), (_x(3),), strict=False)
    explanation = lopro_fx.explain(program)
    assert [line.name for line in explanation.taken] == ["body"]
    assert not [line for line in explanation.skipped if line.name == "inverse"]


@pytest.mark.parametrize("kind", ["autocast", "cond"])
def test_linears_of_nested_graphs_are_listed_in_every_spelling(kind: str) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = (nn.Linear(IN, IN) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if kind == "cond":
                return torch.cond(x.sum() > 0, lambda x: x @ self.one.weight.T, self.two, (x,))
            with torch.autocast("cpu", torch.bfloat16):
                return x @ self.one.weight.T + self.two(x)

    explanation = lopro_fx.explain(torch.export.export(seeded(Nested()), (_x(3),), strict=False))
    assert [line.name for line in explanation.taken] == ["first"]
    reasons = {line.name: line.reason for line in explanation.skipped}
    assert set(reasons) == {"one", "two"}
    assert all("nested graph" in reason for reason in reasons.values())
