"""Which experts Triton serves, and by which kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lopro_fx.kernels import dispatch

# Most pairs of a token and an expert for the gemv, which reads an expert's weight once for each of its pairs.
DECODE_PAIRS = 32
# Tiles along the third axis of a grid.
_TILES = 65535


def refuses(named: Mapping[str, Any]) -> str | None:
    """The reason why Triton can't take these operands of "experts"; None if it can."""
    pairs, experts = named["ids"].shape[0], named["scales"].shape[0]
    if not dispatch.runs_triton(named["x"]):
        return "Triton doesn't serve this device or dtype"
    # A free number is taken for one that fits: a guard would tie a program to it.
    if isinstance(pairs, int) and -(-pairs // 16) + experts > _TILES:
        return f"{pairs} tokens of {experts} experts make more tiles than a grid has"
    return None


def choose_tile(pairs: int | torch.SymInt, experts: int, capability: tuple[int, int]) -> int:
    """Most pairs of a tile, those of an average expert: 16, 64, or 0 for more or a free number, on a device of
    `capability`.

    The registers of an sm_80 don't hold a larger tile.
    """
    if dispatch.at_most(pairs, 16 * experts):
        return 16
    return 64 if dispatch.at_most(pairs, 64 * experts) or capability < (9, 0) else 0
