"""Mixtures of experts in the forms that transformers exports, and small decoders of them."""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401 (defines its operator)
from torch import Tensor, nn
from torch.nn import functional

from tests.programs import VOCAB, WIDTH, Block

EXPERTS, SLOTS, HIDDEN = 5, 2, 64


class Mixture(nn.Module):
    """A router and experts. `form` is "batched" (weights gathered by pair) or "grouped" (pairs sorted by expert).

    With `transposed`, weights are stored as (experts, in_features, out_features); `bias` adds one for each expert,
    interleaved and clamped gates as in gpt-oss.
    """

    def __init__(self, form: str = "batched", transposed: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.form, self.transposed = form, transposed
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        up, down = (EXPERTS, 2 * HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN)
        shapes = [(e, k, n) if transposed else (e, n, k) for e, n, k in (up, down)]
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape) / 5) for shape in shapes)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, x.shape[-1])
        scores, ids = self.gate(tokens).float().softmax(-1).topk(SLOTS, -1)
        scores /= scores.sum(-1, keepdim=True)
        weights, ids = scores.reshape(-1), ids.reshape(-1)
        each = self._batched(tokens, weights, ids) if self.form == "batched" else self._grouped(tokens, weights, ids)
        return each.view(-1, SLOTS, x.shape[-1]).sum(1).to(x.dtype).view(x.shape)

    def _gated(self, y: Tensor) -> Tensor:
        if self.up_bias is None:
            gate, up = y.chunk(2, -1)
            return functional.silu(gate) * up
        gate, up = y[..., ::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.7 * gate) * (up + 1)

    def _batched(self, tokens: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            own = weight[ids]
            y = (
                torch.bmm(x.unsqueeze(1), own).squeeze(1)
                if self.transposed
                else torch.bmm(own, x.unsqueeze(-1)).squeeze(-1)
            )
            return y if bias is None else y.add_(bias[ids])

        y = self._gated(product(tokens.repeat_interleave(SLOTS, 0), self.gate_up_proj, self.up_bias))
        return product(y, self.down_proj, self.down_bias) * weights.unsqueeze(-1)

    def _grouped(self, tokens: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        ids, perm = torch.sort(ids)
        offsets = torch.histc(ids.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            weight = weight if self.transposed else weight.transpose(-2, -1)
            # torch exports its grouped product in bf16 alone, and transformers takes its own elsewhere.
            grouped = functional.grouped_mm if x.dtype == torch.bfloat16 else torch.ops.transformers.grouped_mm_fallback
            y = grouped(x.to(weight.dtype), weight, offs=offsets)
            return y if bias is None else y.add_(bias[ids])

        y = self._gated(product(tokens[perm // SLOTS], self.gate_up_proj, self.up_bias))
        y = product(y, self.down_proj, self.down_bias) * weights[perm].unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.size(0), device=perm.device)
        return y[inverse]


class MixtureDecoder(nn.Module):
    """Ids (batch, sequence) int64 to logits (batch, sequence, vocabulary): attention, then experts."""

    def __init__(self, form: str = "batched", transposed: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.block, self.norm = Block(), nn.LayerNorm(WIDTH)
        self.experts = Mixture(form, transposed, bias)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.block(self.embed(input_ids))
        return self.head(x + self.experts(self.norm(x)))
