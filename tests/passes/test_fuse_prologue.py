"""RMS norms and gated activations become operands of the site behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from lopro_fx.passes.base import counters
from lopro_fx.passes.fuse_prologue import FuseProloguePass
from lopro_fx.passes.fuse_site import FuseSitePass
from lopro_fx.passes.merge import MergeLinearsPass
from lopro_fx.passes.record import META
from tests.passes.quantised import PACKED_SITE, assert_same, assert_unchanged_by, calls, notes, reasons, rewritten
from tests.programs import WIDTH, rows, seeded

aten, wide = torch.ops.aten, torch.float32
NAME = FuseProloguePass.name
RATIO = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Spelled(nn.Module):
    """An RMS norm as models write it: in fp32, rounded before (Llama) or after (Gemma) its weight."""

    def __init__(self, shift: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.shift, self.eps = nn.Parameter(torch.ones(WIDTH)), shift, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.shift:
            return (wide * (self.shift + self.weight.float())).type_as(x)
        return self.weight * wide.to(x.dtype)


class Squared(Spelled):
    """The same by a product with itself, the root on the left."""

    def forward(self, x: Tensor) -> Tensor:
        mean = (x * x).mean(dim=x.dim() - 1, keepdim=True)
        return torch.rsqrt(mean + self.eps) * x * self.weight


class SquaredWide(Squared):
    """That in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.float32)).to(x.dtype)


class Gated(nn.Module):
    """activation(gate(x)) * up(x), then a Linear; `flipped` multiplies the other way round."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = functional.silu, flipped: bool = False) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.activation, self.flipped = activation, flipped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.activation(self.gate(x)), self.up(x)
        return self.down(up * gate if self.flipped else gate * up)


class Around(nn.Module):
    """A norm and a Linear, with what `extra` makes of the two values between."""

    def __init__(self, extra: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm, self.linear, self.extra = nn.RMSNorm(WIDTH, eps=1e-5), nn.Linear(WIDTH, 8), extra

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.linear(y)
        return z if self.extra is None else z + self.extra(x, y)


def prepared(module: nn.Module, *args: Tensor, dynamic: bool = False, **options) -> ExportedProgram:
    program = rewritten(module, *args, dynamic=dynamic, **options)
    return FuseSitePass()(MergeLinearsPass()(program))


def fused(program: ExportedProgram) -> ExportedProgram:
    result = FuseProloguePass()(program)
    result.validate()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [
    nn.RMSNorm(WIDTH, eps=1e-5), Spelled(), Spelled(shift=1.0), Squared(eps=1e-3), SquaredWide()
], ids=["operator", "Llama", "Gemma", "product", "product in fp32"])  # fmt: skip
def test_a_norm_becomes_part_of_its_site(norm: nn.Module, dtype: torch.dtype) -> None:
    module = seeded(nn.Sequential(norm, nn.Linear(WIDTH, 8))).to(dtype)
    x = rows(2, 9).to(dtype)
    program, before = prepared(module, x, dynamic=True), counters["fuse_prologue.norm"]
    result = fused(program)
    assert counters["fuse_prologue.norm"] - before == 1
    (site,) = calls(result, PACKED_SITE)
    assert site.kwargs["eps"] == norm.eps
    nodes = [node.target for node in result.graph.nodes if node.op == "call_function"]
    # A cast to its own type may stay.
    left = {aten.sym_size.int, aten._assert_tensor_metadata.default, *([aten.to.dtype] if x.dtype == wide else [])}
    assert set(nodes) - left == {PACKED_SITE}
    for shape in ((2, 9), (1, 1), (3, 17)):
        assert_same(program, result, 3 * rows(*shape, seed=1).to(dtype), ratio=RATIO[dtype])


def test_a_shifted_weight_is_added_up_ahead_of_time() -> None:
    module = seeded(nn.Sequential(Spelled(shift=1.0), nn.Linear(WIDTH, 8)))
    result = fused(prepared(module, rows(4)))
    assert "0.weight" not in result.state_dict
    perm = result.state_dict["1.perm"].long()
    torch.testing.assert_close(result.state_dict["1.norm"], (module[0].weight.detach() + 1)[perm])


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("name", "activation"), [
    ("silu", functional.silu), ("gelu", functional.gelu),
    ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
])  # fmt: skip
def test_a_gated_activation_becomes_part_of_its_site(
    name: str, activation: Callable[[Tensor], Tensor], flipped: bool
) -> None:
    program = prepared(seeded(Gated(activation, flipped)), rows(2, 9), dynamic=True)
    before = counters["fuse_prologue.gate"]
    result = fused(program)
    assert counters["fuse_prologue.gate"] - before == 1
    first, second = calls(result, PACKED_SITE)
    assert not first.kwargs
    assert second.kwargs["activation"] == name
    assert second.meta[META]["sites"] == ["down"]
    assert {"pass": "fuse_prologue", "what": ["down"], "prologue": "gate"} in notes(result)
    for shape in ((2, 9), (1, 1), (3, 17)):
        assert_same(program, result, rows(*shape, seed=1))


def test_a_linear_without_rotation_becomes_a_site() -> None:
    module = seeded(nn.Sequential(nn.RMSNorm(WIDTH, eps=1e-5), nn.Linear(WIDTH, 8)))
    program = prepared(module, rows(4), rank=0, rotate=False)
    assert not calls(program, PACKED_SITE)
    result = fused(program)
    assert "norm" in calls(result, PACKED_SITE)[0].kwargs
    assert_same(program, result, rows(4, seed=1))


@pytest.mark.parametrize(("extra", "reason"), [
    (lambda x, y: y.sum(-1, keepdim=True), "'rms_norm' is also read by 'sum_1'"),
    (lambda x, y: x.sum(-1, keepdim=True), None),
])  # fmt: skip
def test_what_others_read_is_left(extra: Callable[[Tensor, Tensor], Tensor], reason: str | None) -> None:
    program = prepared(seeded(Around(extra)), rows(4))
    result = fused(program)
    assert reasons(result, NAME).get("linear") == reason
    assert bool(calls(result, PACKED_SITE)[0].kwargs) == (reason is None)
    assert_same(program, result, rows(4, seed=1))


class Written(nn.Module):
    """The norm's input is written after the norm has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(WIDTH, eps=1e-5), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        value = torch.sin(x)
        y = self.norm(value)
        value.add_(1)
        return self.linear(y) + value.sum(-1, keepdim=True)


class Repeated(nn.Module):
    """One Linear of two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.RMSNorm(WIDTH, eps=1e-5) for _ in range(2))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.one(x)) + self.linear(self.two(x))


@pytest.mark.parametrize(("module", "reason"), [
    (nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)), "its input is neither an RMS norm nor a gated"),
    (nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 8)), "its input is neither an RMS norm nor a gated"),
    (Repeated(), "its weight is applied more than once"),
    (Written(), "the program writes into what its prologue reads"),
])  # fmt: skip
def test_anything_else_is_left(module: nn.Module, reason: str) -> None:
    program = prepared(seeded(module), rows(4))
    result = fused(program)
    assert [text for text in reasons(result, NAME).values() if text.startswith(reason)]
    assert_same(program, result, rows(4, seed=1), ratio=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_that_others_read_too_is_the_input(dtype: torch.dtype) -> None:
    """In fp32 export makes later readers of the input read the norm's cast of it."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.second = Spelled(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(self.norm(x))
            return x + self.second(self.norm(x))

    program = prepared(seeded(Stream()).to(dtype), rows(4).to(dtype))
    result = fused(program)
    assert [set(site.kwargs) for site in calls(result, PACKED_SITE)] == 2 * [{"norm", "eps"}]
    assert_same(program, result, rows(4, seed=1).to(dtype), ratio=RATIO[dtype])


def test_linears_that_are_not_merged_keep_their_norm() -> None:
    program = rewritten(seeded(nn.Sequential(nn.RMSNorm(WIDTH, eps=1e-5), Gated())), rows(4))
    result = fused(FuseSitePass()(program))
    assert reasons(result, NAME)["1.gate"] == "its rotation or low-rank branch is shared by several readers"


def test_the_input_program_is_not_changed() -> None:
    assert_unchanged_by(fused, prepared(seeded(Gated()), rows(4)))


def test_a_second_run_changes_nothing() -> None:
    once = fused(prepared(seeded(nn.Sequential(Spelled(shift=1.0), Gated())), rows(4)))
    assert fused(once).graph_module.code == once.graph_module.code


@given(st.integers(1, 70), st.integers(1, 40), st.sampled_from([2, 3, 4, 8]), st.integers(0, 3), st.booleans())
def test_any_sizes(width: int, out: int, bits: int, rank: int, rotate: bool) -> None:
    module = seeded(nn.Sequential(nn.RMSNorm(width, eps=1e-5), nn.Linear(width, out)))
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    program = prepared(module, x, bits=bits, rank=rank, rotate=rotate)
    assert_same(program, fused(program), x)
