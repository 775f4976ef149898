"""Packed sites: the dense matrix that the operators compute with, and the bytes that they take."""

from __future__ import annotations

import pytest
import torch

from lopro_fx.layer import dense_weight, stored_bytes
from tests.helpers import assert_close
from tests.passes.packs import packed
from tests.programs import decoder, rows

ops = torch.ops.lopro


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("rotate", [True, False])
def test_the_dense_weight_is_what_the_operators_compute(rank: int, rotate: bool) -> None:
    groups, sites = packed(decoder()[1], rank, rotate)
    group, site = groups["blocks.0.q"], sites["blocks.0.k"]
    assert group.transform.is_identity != rotate
    x = rows(5)
    rotated = ops.rotate(x, *vars(group.transform).values())
    latent = ops.project(rotated, group.tensors["down"], group.tensors["down_scale"]) if rank else None
    own = site.tensors
    y = ops.packed_linear(rotated, own["codes"], own["scales"], own["zeros"], None, latent, own.get("up"),
                          own.get("up_scale"), *site.weight.spec.values())  # fmt: skip
    assert_close("output", x.double() @ dense_weight(group, site).double().T, y, 2e-6)


def test_stored_bytes_are_those_of_the_values() -> None:
    assert stored_bytes([torch.zeros(3, 5, dtype=torch.int32), torch.zeros(7, dtype=torch.int8)]) == 67
    assert stored_bytes([]) == 0
