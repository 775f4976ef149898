"""Products of tokens with the weights of their experts: unquantised, and packed in every format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopro_fx.kernels.formats.packed import Packed, stacked
from lopro_fx.kernels.formats.registry import dequantize, empty, operator_of
from lopro_fx.methods.rtn import RTN
from tests.helpers import generator, relative_rms

FORMATS: dict[str, dict[str, Any]] = {
    "affine": {"bits": 3, "group_size": 32},
    "trellis": {"format": "trellis", "bits": 2, "window": 12},
}


def packed_experts(name: str, experts: int, out: int, width: int) -> Packed:
    quantizer = RTN(**FORMATS[name]).quantizer
    weights = torch.randn(experts, out, width, generator=generator(experts))
    return stacked([quantizer.nearest(weight, (out,)).packed() for weight in weights])


def branch(experts: int, out: int, rank: int, grid: tuple[int, int], core: bool, tokens: int) -> tuple[Any, ...]:
    """latent, up, up_scale, cells, core of experts that fill a grid from its first cell on."""
    rng, (rows, columns) = generator(rank), grid
    cells = torch.tensor([[index // columns % rows, index % columns] for index in range(experts)], dtype=torch.int32)
    cores = torch.randn(experts, rank, rank, generator=rng).to(torch.float16) if core else None
    up = torch.randint(-99, 99, (columns, out, rank), generator=rng, dtype=torch.int8)
    scale = torch.rand(columns, rank, generator=rng).to(torch.float16)
    return torch.randn(tokens, rows * rank, generator=rng), up, scale, cells, cores


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(0, 9), slots=st.integers(1, 3), experts=st.integers(1, 6), seed=st.integers(0, 99))
def test_each_row_is_multiplied_by_its_own_expert(tokens: int, slots: int, experts: int, seed: int) -> None:
    rng = generator(seed)
    x, weight = torch.randn(tokens, 8, generator=rng), torch.randn(experts, 5, 8, generator=rng)
    ids = torch.randint(experts, (tokens * slots,), generator=rng)
    y = torch.ops.lopro.routed_linear(x, ids, weight, slots)
    naive = [weight[expert] @ x[row // slots] for row, expert in enumerate(ids.tolist())]
    assert y.shape == (tokens * slots, 5)
    assert relative_rms(torch.stack(naive) if naive else y, y) < 1e-6


def test_the_derivative_of_routed_products() -> None:
    rng = generator()
    x = torch.randn(3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 2, 2, 0, 2, 0])
    assert torch.autograd.gradcheck(lambda a, b: torch.ops.lopro.routed_linear(a, ids, b, 2), (x, weight))
    torch.library.opcheck(torch.ops.lopro.routed_linear.default, (x, ids, weight, 2))


@pytest.mark.parametrize("ids", [[0, 3], [-1, 0], [0]])
def test_wrong_ids_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="3 experts"):
        torch.ops.lopro.routed_linear(torch.ones(1, 4), torch.tensor(ids), torch.ones(3, 2, 4), 2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_packed_experts_are_their_dense_matrices(name: str, core: bool, tokens: int) -> None:
    packed, slots = packed_experts(name, 5, 64, 96), 2
    x, ids = torch.randn(tokens, 96, generator=generator(2)), torch.tensor([4, 0, 1, 1, 4, 2, 0, 2, 2, 1, 0, 4])
    ids = ids[: tokens * slots]
    latent, up, scale, cells, cores = branch(5, 64, 4, (2, 3), core, tokens)
    operator = operator_of(packed.format, "experts")
    args = (x, ids, slots, *packed.tensors.values(), latent, up, scale, cells, cores, *packed.spec.values())
    y, dense = operator(*args), dequantize(packed, torch.float32)
    want = []
    for row, expert in enumerate(ids.tolist()):
        place, column = cells[expert].tolist()
        own = latent[row // slots].view(2, 4)[place]
        own = own if cores is None else cores[expert].float() @ own
        want.append(dense[expert] @ x[row // slots] + (up[column].float() * scale[column].float()) @ own)
    assert y.shape == (tokens * slots, 64)
    assert relative_rms(torch.stack(want) if want else y, y) < 1e-5
    if tokens:
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("name", FORMATS)
def test_the_shapes_of_packed_experts_follow_from_their_spec(name: str) -> None:
    packed = packed_experts(name, 3, 64, 96)
    shapes = {key: tensor.shape for key, tensor in empty(packed.format, packed.shape, packed.spec).tensors.items()}
    assert shapes == {key: tensor.shape for key, tensor in packed.tensors.items()}
    each: list[Tensor] = [dequantize(packed.expert(index), torch.float32) for index in range(3)]
    assert torch.equal(torch.stack(each), dequantize(packed, torch.float32))


def test_stacking_keeps_the_widest_scales() -> None:
    quantizer = RTN(bits=4, group_size=32).quantizer
    near, far = (quantizer.nearest(torch.ones(8, 32), (8,)).times(torch.full((8, 1), unit)) for unit in (1.0, 2.0**40))
    packed = stacked([near.packed(), far.packed()])
    assert packed.tensors["scales"].dtype == torch.float32
    assert dequantize(packed, torch.float32)[1].max() > 2.0**39
