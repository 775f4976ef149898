"""Choice of the next token of each row: the likeliest, or a draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError, ModelError

_GREEDY = 1e-5  # temperature below which a draw could only choose among equally likeliest tokens


class Sampler:
    """Sampler of tokens from logits, with the probabilities of transformers' `generate` for the same settings.

    Args:
        temperature: 0 takes the likeliest token, and so does anything below 1e-5; above, tokens are drawn from
            softmax(logits / temperature).
        top_k: draw among that many likeliest; 0 for all.
        top_p: draw among the likeliest whose probabilities together reach it, in (0, 1].
        seed: of the draws; the same seed gives the same tokens.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> None:
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"temperature={temperature:g}: must be 0 (greedy) or above, and finite")
        if top_k < 0:
            raise ConfigError(f"top_k={top_k}: must be 0 (all tokens) or above")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p={top_p:g}: must be above 0 and at most 1")
        self._temperature, self._top_k, self._top_p = temperature, top_k, top_p
        try:
            self._generator = torch.Generator().manual_seed(seed)
        except (RuntimeError, ValueError, OverflowError) as error:  # depends on the version
            raise ConfigError(f"seed={seed}: must have at most 64 bits") from error

    def pick(self, logits: Tensor) -> Tensor:
        """Pick tokens (B,) int64 on the CPU from logits (B, vocabulary).

        Raises:
            ModelError: logits are not finite.
        """
        logits = logits.float().cpu()
        if not torch.isfinite(logits).all():
            raise ModelError("the model's logits are not finite: check its weights, or use a wider dtype")
        if self._temperature < _GREEDY:
            return logits.argmax(-1)
        # The largest is 0 after the subtraction, so that no quotient can overflow.
        scaled = (logits - logits.amax(-1, keepdim=True)) / self._temperature
        probabilities = torch.softmax(self._kept(scaled), -1)
        return torch.multinomial(probabilities, 1, generator=self._generator)[:, 0]

    def _kept(self, logits: Tensor) -> Tensor:
        if 0 < self._top_k < logits.shape[-1]:
            least = logits.topk(self._top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self._top_p < 1:
            ordered, order = logits.sort(-1, descending=True)
            probabilities = torch.softmax(ordered, -1)
            before = probabilities.cumsum(-1) - probabilities
            dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before >= self._top_p)
            logits = logits.masked_fill(dropped, -torch.inf)
        return logits
