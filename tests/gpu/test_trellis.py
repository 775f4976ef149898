"""Trellis weights of a large layer on the device, for each class of tokens and inside a compiled program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels.formats import registry
from lopro_fx.kernels.formats.base import Packed
from tests.helpers import TOLERANCE, assert_close
from tests.triton.problems import trellis_weight

pytestmark = pytest.mark.gpu
ROWS, COLUMNS = 2816, 4096
SPECS = [(1.5, 2, 16, 512), (2.0, 2, 16, -1), (2.5, 2, 14, 512), (2.0, 1, 12, 32), (3.0, 1, 16, 512), (4.0, 1, 16, -1)]


def _weight(spec: tuple[float, int, int, int]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Packed tensors on the device, and the definition of the weight in fp64."""
    bits, columns, window, strip = spec
    scales, codes = trellis_weight(ROWS, COLUMNS, bits, columns, strip)
    names = {"bits": bits, "columns": columns, "window": window, "strip": strip}
    packed = Packed("trellis", (ROWS, COLUMNS), names, {"scales": scales, "codes": codes})
    return (scales.cuda(), codes.cuda()), registry.dequantize(packed, torch.float32).cuda().double()


@pytest.mark.parametrize("tokens", [1, 16, 600])
@pytest.mark.parametrize("spec", SPECS)
def test_products(spec: tuple[float, int, int, int], tokens: int) -> None:
    weight, exact = _weight(spec)
    rng = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, COLUMNS, device="cuda", generator=rng).to(torch.bfloat16)
    y = torch.ops.lopro.trellis_linear(x, *weight, None, None, None, None, *spec)
    assert_close("y", x.double() @ exact.T, y, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("tokens", [1, 16])
def test_compiled(tokens: int) -> None:
    spec = SPECS[0]
    weight, exact = _weight(spec)
    x = torch.randn(tokens, COLUMNS, device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    @torch.compile(fullgraph=True)
    def program(x: Tensor, *weight: Tensor) -> Tensor:
        return torch.relu(torch.ops.lopro.trellis_linear(2 * x, *weight, None, None, None, None, *spec))

    # Fixed point rounds an activation by at most 2^-16 of its group's largest entry.
    assert_close("y", torch.relu(2 * x.double() @ exact.T), program(x, *weight), 5e-4)
