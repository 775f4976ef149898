"""Attention of the decode program: queries that share a key head are rows of one product, so no key is copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "sdpa"
# Arguments that transformers' function applies and this one doesn't.
_UNKNOWN = ("position_bias", "softcap", "cache")


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of one token a row.

    Args:
        query: (B, heads, 1, D); key: (B, key_heads, L, D); value: (B, key_heads, L, E); key_heads divides heads.
        mask: bool (B, 1, 1, L), True where a query may look.
        scale: of the scores; D ** -0.5 by default.

    Returns:
        (B, 1, heads, E), and None for the weights.
    """
    batch, heads, _, width = query.shape
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    if query.device.type == "cpu" and mask is not None:
        out = _products(rows, key, value, mask, scale)
    else:
        out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention as sums of products, which Inductor turns into loops: one GEMM a head would cost more in calls."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    query = query.float() * factor
    # Two readers make Inductor store the query; for one, it would compute the rotary sines again for every key.
    half = query.shape[-1] // 2
    scores = (query[..., None, :half] * key[:, :, None, :, :half].float()).sum(-1)
    scores = scores + (query[..., None, half:] * key[:, :, None, :, half:].float()).sum(-1)
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = (weights[..., None] * value.float()[:, :, None]).sum(-2) / weights.sum(-1, keepdim=True)
    return out.to(value.dtype)


@contextmanager
def grouped_attention_in(model: nn.Module) -> Iterator[None]:
    """Replace PyTorch's attention by `grouped_attention` in the model's calls, through transformers' registry.

    The attention keeps its name, since models choose branches, classes and the form of their masks by it. Calls that
    the function doesn't cover (several tokens, a bias, a mask a head), and other models, get the original.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as plain

    if AttentionInterface()[_NAME] is not plain:  # someone else's attention, which may compute anything
        yield
        return
    ours = set(model.modules())

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        mask = attention_mask
        one_for_all = mask is None or (mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1)
        more = any(kwargs.get(name) is not None for name in _UNKNOWN)
        if module in ours and query.shape[2] == 1 and one_for_all and not more:
            return grouped_attention(query, key, value, mask, kwargs.get("scaling"))
        return plain(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(_NAME, attention)
    try:
        yield
    finally:
        AttentionInterface.register(_NAME, plain)
