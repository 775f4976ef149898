"""A weight of more than 2^31 packed words, whose last rows lie where 32-bit addresses don't reach."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels.formats.affine.packing.format import dequantize
from tests.helpers import TOLERANCE, assert_close

pytestmark = pytest.mark.gpu
BITS, GROUP, COLUMNS = 8, 128, 32768
GROUPS, WORDS = COLUMNS // GROUP, COLUMNS // 4
ROWS = (1 << 31) // WORDS + 4096
SLICE = 64
Packed = tuple[Tensor, Tensor, Tensor]


def _random_words(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device="cuda", generator=rng)


@pytest.fixture(scope="module")
def packed() -> Iterator[Packed]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free device memory")
    rng = torch.Generator("cuda").manual_seed(0)
    codes = _random_words((ROWS, WORDS), rng)
    scales = (torch.rand(ROWS, GROUPS, device="cuda", generator=rng) / 256 + 1e-3).half()
    zeros = _random_words((ROWS * GROUPS // 4,), rng)
    assert codes.numel() > 1 << 31
    yield codes, scales, zeros
    del codes, scales, zeros
    torch.cuda.empty_cache()


def _rows(packed: Packed, first: int, dtype: torch.dtype) -> Tensor:
    """Reference weight of SLICE rows."""
    codes, scales, zeros = packed
    part = slice(first, first + SLICE)
    grid = zeros[first * GROUPS // 4 : (first + SLICE) * GROUPS // 4]
    return dequantize(codes[part], scales[part], grid, BITS, GROUP, COLUMNS, dtype)


@pytest.mark.parametrize("first", [0, ROWS // 2, ROWS - SLICE])
def test_dequantize(packed: Packed, first: int) -> None:
    from lopro_fx.kernels.formats.affine.packing.device import dequantize_device

    dense = dequantize_device(*packed, BITS, GROUP, COLUMNS, torch.bfloat16)
    assert torch.equal(dense[first : first + SLICE], _rows(packed, first, torch.bfloat16))


@pytest.mark.parametrize("tokens", [1, 16, 40, 130])
def test_products(packed: Packed, tokens: int) -> None:
    rng = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, COLUMNS, device="cuda", generator=rng).to(torch.bfloat16)
    y = torch.ops.lopro.packed_linear(x, *packed, None, None, None, None, BITS, GROUP)
    for first in (0, ROWS // 2, ROWS - SLICE):
        expected = x.double() @ _rows(packed, first, torch.float32).double().T
        assert_close(f"rows from {first}", expected, y[:, first : first + SLICE], TOLERANCE[torch.bfloat16])
