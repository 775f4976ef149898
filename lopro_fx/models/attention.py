"""Attention of the decode program: queries that share a key head are rows of one product, so no key is copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "lopro_fx_grouped"


def grouped_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention in the form of transformers' attention functions.

    Args:
        query: (B, heads, 1, D); key: (B, key_heads, L, D); value: (B, key_heads, L, E); key_heads divides heads.
        attention_mask: bool (B, 1, 1, L), True where a query may look.
        kwargs: `scaling` is used; dropout is for training.

    Returns:
        (B, 1, heads, E), and None for the weights.
    """
    batch, heads, length, width = query.shape
    assert length == 1, "with several tokens a row, each would need a mask of its own"
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    if query.device.type == "cpu" and attention_mask is not None:
        out = _products(rows, key, value, attention_mask, kwargs.get("scaling"))
    else:
        out = nn.functional.scaled_dot_product_attention(
            rows, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
        )
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """The same as sums of products, which Inductor makes loops of: a matrix product a head costs more in calls."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    query = query.float() * factor
    # Two readers make Inductor store the query: it would compute a single reader's sines again for every key.
    half = query.shape[-1] // 2
    scores = (query[..., None, :half] * key[:, :, None, :, :half].float()).sum(-1)
    scores = scores + (query[..., None, half:] * key[:, :, None, :, half:].float()).sum(-1)
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = (weights[..., None] * value.float()[:, :, None]).sum(-2) / weights.sum(-1, keepdim=True)
    return out.to(value.dtype)


@contextmanager
def grouped_attention_in(config: Any) -> Iterator[None]:
    """Let a model that uses PyTorch's attention use this one meanwhile; others (soft-capped, eager) keep theirs."""
    from transformers import AttentionInterface

    if config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(_NAME, grouped_attention)
    with switched(config, "_attn_implementation", _NAME):
        yield


@contextmanager
def switched(config: Any, name: str, value: Any) -> Iterator[None]:
    """Let a setting have another value meanwhile."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)
