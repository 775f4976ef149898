"""The trellis format's Triton kernels and operators against the format's definition."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from triton.language.semantic import TritonSemantic

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels import dispatch
from lopro_fx.kernels.formats import registry
from lopro_fx.kernels.formats.base import Packed
from lopro_fx.kernels.formats.registry import reference
from lopro_fx.kernels.formats.trellis.code import table
from lopro_fx.kernels.formats.trellis.decode.device import choose_splits, prepare, trellis_product
from lopro_fx.kernels.formats.trellis.packing.device import trellis_dequantize
from lopro_fx.kernels.project.reference import dense_factor
from tests.helpers import TOLERANCE, assert_close, generator
from tests.triton.conftest import INTERPRETED
from tests.triton.problems import Problem, problem, trellis_weight
from tests.triton.test_kernels import DECODE_TOLERANCE, DTYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _integers_wrap_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products mod 2^32 are meant: the interpreter's checks for overflow take half of its time."""
    if INTERPRETED:
        monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *args, **kwargs: None)


def dense(scales: Tensor, codes: Tensor, spec: tuple[float, int, int, int], k: int, dtype: torch.dtype) -> Tensor:
    """The definition of the weight."""
    names = dict(zip(("bits", "columns", "window", "strip"), spec, strict=True))
    tensors = {"scales": scales, "codes": codes}
    return registry.dequantize(Packed("trellis", (scales.shape[0], k), names, tensors), dtype)


def site(p: Problem, weight: tuple[Tensor, Tensor], spec: tuple[float, int, int, int]) -> tuple[Any, ...]:
    """Arguments of `lopro::trellis_site`."""
    before = (p.x, p.perm, p.signs, p.block, p.skip, p.down, p.down_scale)
    return (*before, *weight, p.bias, p.up, p.up_scale, *spec)


@pytest.mark.parametrize("scale", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "bits", "columns", "window", "strip"),
    [
        (1, 1, 2.0, 1, 12, -1),
        (1, 1, 2.0, 2, 16, 512),
        (40, 99, 1.5, 2, 16, -1),
        (32, 7, 2.5, 2, 14, 32),
        (130, 33, 2.5, 2, 12, 32),
        (544, 34, 2.0, 2, 14, 512),
        (768, 5, 3.0, 1, 14, 512),
        (100, 65, 4.0, 1, 16, 32),
        (64, 70, 2.0, 1, 12, -1),
    ],
)
def test_dequantize(
    device: torch.device, dtype: torch.dtype, scale: torch.dtype, n: int, k: int, bits: float, columns: int,
    window: int, strip: int,
) -> None:  # fmt: skip
    scales, codes = (tensor.to(device) for tensor in trellis_weight(n, k, bits, columns, strip, dtype=scale))
    got = trellis_dequantize(scales, codes, round(bits * columns), columns, window, strip, k, dtype)
    assert torch.equal(dense(scales, codes, (bits, columns, window, strip), k, dtype), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "bits", "columns", "rank", "factor_bits", "parts"),
    [(40, 99, 2.0, 2, 3, 8, 1), (33, 70, 3.0, 1, 16, 16, 1), (66, 130, 1.5, 2, 19, 8, 3)],
)
def test_dequantize_with_the_branch(
    device: torch.device, dtype: torch.dtype, n: int, k: int, bits: float, columns: int, rank: int, factor_bits: int,
    parts: int,
) -> None:  # fmt: skip
    p = problem(1, k, n, 2, 32, rank=rank, factor_bits=factor_bits, parts=parts)
    assert p.up is not None
    assert p.down is not None
    scales, codes = trellis_weight(n, k, bits, columns, 32)
    branch = dense_factor(p.up, p.up_scale, 1) @ dense_factor(p.down, p.down_scale, 0)
    expected = dense(scales, codes, (bits, columns, 14, 32), k, torch.float32) + branch
    operands = (scales, codes, round(bits * columns), columns, 14, 32, k, dtype, p.up, p.up_scale, p.down, p.down_scale)
    got = trellis_dequantize(*(value.to(device) if isinstance(value, Tensor) else value for value in operands))
    assert_close("weight", expected, got.cpu(), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("n", "k", "bits", "columns", "window", "strip", "rank", "dtype", "scale"),
    [
        (1, 1, 2.0, 1, 12, -1, 0, torch.float32, torch.float16),
        (1, 3, 2.0, 2, 16, 512, 2, torch.float32, torch.float32),
        (40, 61, 1.5, 2, 16, -1, 4, torch.float16, torch.float16),
        (100, 33, 2.5, 2, 14, 32, 0, torch.float32, torch.float32),
        (33, 30, 3.0, 1, 14, 512, 5, torch.float16, torch.float16),
        (64, 29, 4.0, 1, 16, 32, 3, torch.float32, torch.float16),
        (544, 20, 2.0, 2, 12, 512, 0, torch.float32, torch.float16),
    ],
)
def test_one_token(
    device: torch.device, n: int, k: int, bits: float, columns: int, window: int, strip: int, rank: int,
    dtype: torch.dtype, scale: torch.dtype,
) -> None:  # fmt: skip
    p = problem(1, k + k % 2, n, 2, 32, rank=rank, biased=rank > 2, dtype=dtype, factor_bits=16 if rank == 5 else 8)
    x, down = p.x[:, :k].contiguous(), None if p.down is None else p.down[:, :k].contiguous()
    scales, codes = trellis_weight(n, k, bits, columns, strip, dtype=scale)
    spec = (bits, columns, window, strip)
    bias = None if p.bias is None else p.bias.float()
    rest = (None, None, 1, 0, down, p.down_scale, scales, codes, bias, p.up, p.up_scale, *spec)
    expected = reference("trellis", "site")(x.float(), *rest)
    operands = (x, down, scales, codes, p.bias, p.down_scale, p.up, p.up_scale)
    x, down, scales, codes, *after = (None if value is None else value.to(device) for value in operands)
    words, steps, latent = prepare(x, None, None, 1, down)
    got = trellis_product(
        words, steps, latent, scales, codes, *after, round(bits * columns), columns, window, strip, k, 1, dtype
    )
    assert got.dtype == dtype
    assert_close("y", expected, got.cpu(), DECODE_TOLERANCE[dtype])


def test_parts_of_the_columns(device: torch.device) -> None:
    """Five groups of 128 columns in two parts, of which the second has one: in a fixed order, to the bit."""
    scales, codes = trellis_weight(40, 513, 2.0, 2, -1)
    x = torch.randn(1, 513, generator=generator())
    expected = functional.linear(x, dense(scales, codes, (2.0, 2, 14, -1), 513, torch.float32))
    words, steps, latent = prepare(x.to(device), None, None, 1, None)
    weight = (scales.to(device), codes.to(device), None, None, None, None, 4, 2, 14, -1, 513)
    got = trellis_product(words, steps, latent, *weight, 2, torch.float32)
    assert_close("y", expected, got.cpu(), 5e-4)
    # The interpreter has one order alone, and takes its time.
    if not INTERPRETED:
        assert torch.equal(got, trellis_product(words, steps, latent, *weight, 2, torch.float32))


def test_splits_fill_the_device() -> None:
    for columns, programs in ((1, 4), (2, 16)):
        assert choose_splits(1 << 20, 64, columns, 132) == 1
        assert choose_splits(128, 4, columns, 132) == 1
        # Each of four warps keeps a group.
        assert choose_splits(128, 64, columns, 132) == 16
        assert programs * 132 <= 224 * choose_splits(28672, 64, columns, 132) < 2 * programs * 132


def test_sums_of_a_group_fit_an_integer(device: torch.device) -> None:
    """Largest activations times the largest value, in every column: what an integer has to hold at most."""
    values = table(16, 1)[:, 0]
    state = int(values.argmax())
    # One row a string: its state is the lowest 16 bits of the first word.
    codes = torch.zeros(128, 2, dtype=torch.int32)
    codes[:, 0] = state
    x, scales = torch.ones(1, 128, device=device), torch.ones(1, device=device)
    words, steps, latent = prepare(x, None, None, 1, None)
    weight = (scales, codes.flatten().to(device), None, None, None, None, 2, 1, 16, -1, 128)
    got = trellis_product(words, steps, latent, *weight, 1, torch.float32)
    assert_close("y", 128 * values[state].view(1, 1), got.cpu(), 1e-6)


@pytest.mark.parametrize(
    ("tokens", "skip", "around"),
    [
        (1, 0, "norm"),
        (1, 32, ""),
        (3, 0, "norm"),
        (4, 32, "gate"),
        (dispatch.NORM_TOKENS + 1, 0, "norm"),
        (2, 0, ""),
        (5, 0, "gate"),
        (6, 32, "norm"),
    ],
)
def test_operators_agree_with_their_definitions(device: torch.device, tokens: int, skip: int, around: str) -> None:
    p = problem(tokens, 64, 40, 2, 32, rank=4, block=32, skip=skip, permuted=True, biased=True, parts=2)
    spec, rng = (2.0, 2, 14, 32), generator(1)
    arguments = site(p, trellis_weight(40, 64, 2.0, 2, 32), spec)
    named: dict[str, Any] = {"residual": torch.randn(tokens, 40, generator=rng)}
    if around == "norm":
        named |= {"norm": torch.randn(64, generator=rng), "eps": 1e-2}
    elif around == "gate":
        named |= {"gate": torch.randn(tokens, 64, generator=rng), "activation": "silu"}
    expected = reference("trellis", "site")(*arguments, **named)
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in named.items()}
    with dispatch.triton_on_cpu() if INTERPRETED else contextlib.nullcontext():
        got = torch.ops.lopro.trellis_site(
            *(value.to(device) if isinstance(value, Tensor) else value for value in arguments), **there
        )
    assert_close("site", expected, got.cpu(), 5e-4)


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_linear_takes_a_latent_of_its_own(device: torch.device, tokens: int) -> None:
    p = problem(tokens, 32, 40, 2, 32, rank=4, biased=True)
    x, latent = p.x.view(1, tokens, 32), torch.randn(1, tokens, 4, generator=generator(2))
    scales, codes = trellis_weight(40, 32, 3.0, 1, 32)
    arguments = (x, scales, codes, p.bias, latent, p.up, p.up_scale, 3.0, 1, 14, 32)
    expected = reference("trellis", "linear")(*arguments)
    with dispatch.triton_on_cpu() if INTERPRETED else contextlib.nullcontext():
        got = torch.ops.lopro.trellis_linear(
            *(value.to(device) if isinstance(value, Tensor) else value for value in arguments)
        )
    assert_close("linear", expected, got.cpu(), 5e-4)
