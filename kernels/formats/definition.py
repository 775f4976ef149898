"""Definitions of a format's operators in plain ATen, from its `dequantize` and `lookup`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from lopro_fx.kernels.formats.base import Format
from lopro_fx.kernels.project.reference import dense_factor, project
from lopro_fx.kernels.prologue.reference import prologue
from lopro_fx.kernels.rotate.reference import rotate
from lopro_fx.kernels.routed.branches import Branches
from lopro_fx.kernels.routed.reference import by_expert, require_fit


def linear(format: Format, named: Mapping[str, Any]) -> Tensor:
    """Gemm with a packed weight, plus bias and low-rank branch.

    Args:
        format: of the weight.
        named: operands by name:
            x: (..., in_features) rotated activation.
            the format's tensors and the names of its spec: the packed weight.
            bias: (out_features,) or None.
            latent: (..., rank), the output of `lopro::project`, or None.
            up: int8 or fp16 (out_features, rank), with `latent`.
            up_scale: (rank,), or (parts, rank) where `parts` runs of equally many rows of `up` have scales of their
                own (merged Linears), or None for fp16 factors.

    Returns:
        (..., out_features) of x's dtype.
    """
    x, latent = named["x"], named["latent"]
    weight = format.dequantize(format.of(named, x.shape[-1]), x.dtype)
    y = functional.linear(x, weight, named["bias"])
    if latent is not None and named["up"] is not None:
        y = y + functional.linear(latent, dense_factor(named["up"], named["up_scale"], 1).to(x.dtype))
    return y


def site(format: Format, named: Mapping[str, Any]) -> Tensor:
    """`linear` with the `rotate` and `project` that only it reads, a prologue and a residual.

    Args:
        format: of the weight.
        named: operands by name:
            x: (..., in_features), not rotated.
            perm, signs, block, skip: as in `lopro::rotate`; no permutation and a block of 1 leave x as it is.
            down, down_scale: as in `lopro::project`, or None at rank 0.
            norm, eps, gate, activation: applied to x first, as in `prologue/reference.py`.
            residual: (..., out_features), added to the result, or None.
            all others: as in `linear`.

    Returns:
        (..., out_features) of x's dtype.
    """
    x, perm = prologue(*(named[key] for key in ("x", "perm", "norm", "eps", "gate", "activation")))
    if perm is not None or named["block"] > 1:
        x = rotate(x, perm, named["signs"], named["block"], named["skip"])
    latent = None if named["down"] is None else project(x, named["down"], named["down_scale"])
    y = linear(format, {**named, "x": x, "latent": latent})
    return y if named["residual"] is None else y + named["residual"]


def experts(format: Format, named: Mapping[str, Any]) -> Tensor:
    """Multiply each token by the packed weights of its experts, and add their low-rank branches.

    Expert e has the branch up[c] core[e] down[r], with (r, c) = cells[e]: experts share factors by rows and columns of
    a grid (TileQ, arXiv 2605.09281).

    Args:
        format: of the weights.
        named: operands by name:
            x: (tokens, in_features) rotated activation.
            ids: int64 or int32 (tokens * slots,), the experts of a token beside one another, each in [0, experts).
            slots: experts of a token.
            the format's tensors, each with a first dimension of experts, and the names of its spec.
            latent: (tokens, rows * rank), the output of `lopro::project` for the factors down of all rows, or None.
            up: int8 or fp16 (columns, out_features, rank), with `latent`.
            up_scale: (columns, rank), or None for fp16 factors.
            cells: int32 (experts, 2), row and column of each expert; None gives each its own.
            core: fp16 (experts, rank, rank), or None for the identity.

    Returns:
        (tokens * slots, out_features) of x's dtype.
    """
    x, ids, slots = (named[key] for key in ("x", "ids", "slots"))
    packed = format.of(named, x.shape[-1])
    require_fit(x, ids, packed.experts, packed.shape[-1], slots)
    latent = named["latent"]
    branches = None if latent is None else Branches.of(named, packed.experts)
    y = x.new_zeros(ids.shape[0], packed.shape[1])
    for expert, rows in by_expert(ids, packed.experts):
        tokens = rows // slots
        part = functional.linear(x[tokens], format.dequantize(packed.expert(expert), x.dtype))
        if latent is not None and branches is not None:
            part = part + branches.of_expert(expert, latent[tokens])
        y[rows] = part
    return y


def experts_site(
    format: Format, named: Mapping[str, Any], product: Callable[[Format, Mapping[str, Any]], Tensor] = experts
) -> Tensor:
    """`experts` with the `rotate` and `project` that only it reads, and a gated activation before them.

    Args:
        format: of the weights.
        named: operands by name:
            x: (tokens, in_features), not rotated.
            perm, signs, block, skip: as in `lopro::rotate`, for all experts.
            down, down_scale: int8 or fp16 (rows * rank, in_features) and (rows * rank,), or None.
            gate, activation: applied to x first, as in `prologue/reference.py`.
            all others: as in `experts`.
        product: `experts`, or an operator that computes it.

    Returns:
        (tokens * slots, out_features) of x's dtype.
    """
    x, perm = prologue(named["x"], named["perm"], None, 0.0, named["gate"], named["activation"])
    if perm is not None or named["block"] > 1:
        x = rotate(x, perm, named["signs"], named["block"], named["skip"])
    latent = None if named["down"] is None else project(x, named["down"], named["down_scale"])
    return product(format, {**named, "x": x, "latent": latent})


def embedding(format: Format, named: Mapping[str, Any]) -> Tensor:
    """Rows of a packed table.

    Args:
        format: of the table.
        named: operands by name:
            ids: int64 or int32, any shape, each in [0, rows).
            the format's tensors and the names of its spec: the packed table.
            in_features: columns of the table.
            dtype: of the result.

    Returns:
        (*ids.shape, in_features) of `dtype`.
    """
    return format.lookup(format.of(named, named["in_features"]), named["ids"], named["dtype"])
