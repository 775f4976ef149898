"""Perplexity and bits per byte of a program on windows of tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.progress import Progress, silent
from lopro_fx.tokens import require_known

_ROWS = 128  # logits that are turned into float32 log-probabilities at a time


@dataclass(frozen=True)
class PerplexityResult:
    """ppl: exp(nll_mean); nll_mean: nats per predicted token; tokens: those predicted; bits_per_byte: None without the
    number of bytes; seconds: wall time."""

    ppl: float
    nll_mean: float
    tokens: int
    bits_per_byte: float | None
    seconds: float


def perplexity(
    program: Callable[[Tensor], Tensor],
    windows: Tensor,
    *,
    n_bytes: int | None = None,
    progress: Progress = silent,
    device: torch.device | str = "cpu",
) -> PerplexityResult:
    """Measure perplexity on `windows` (W, S) int64: in each, tokens 1..S-1 are predicted from those before them.

    Args:
        program: (1, S) token ids -> (1, S, vocabulary) logits; an exported program's `.module()` or any callable.
        windows: as `token_windows` makes them; S >= 2.
        n_bytes: UTF-8 bytes of the predicted tokens' text (`predicted_bytes`), for bits per byte.
        progress: called after each window with (windows done, W, the perplexity so far).
        device: where the program runs.

    Raises: ConfigError if there is nothing to predict or a token is none of the model's; ModelError if logits are not
        finite.
    """
    require_windows(windows)
    require_known(program, windows, "the text to evaluate on")
    started = time.perf_counter()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for index, window in enumerate(windows):
            logits = program(window[None].to(device))[0, :-1]
            for rows, targets in zip(logits.split(_ROWS), window[1:].split(_ROWS), strict=True):
                total += functional.cross_entropy(rows.float(), targets.to(rows.device), reduction="sum").item()
            if not math.isfinite(total):
                raise ModelError(f"window {index}: the log-probabilities are not finite: check the model's weights")
            tokens += len(window) - 1
            progress(index + 1, len(windows), f"perplexity {_exp(total / tokens):.3f}")
    return perplexity_of(total, tokens, n_bytes, time.perf_counter() - started)


def require_windows(windows: Tensor) -> None:
    """Require `windows` of shape (1 or more, 2 or more tokens). Raises: ConfigError."""
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ConfigError(f"windows of shape {tuple(windows.shape)}: (1 or more, 2 or more tokens) are needed")


def perplexity_of(nats: float, tokens: int, n_bytes: int | None, seconds: float) -> PerplexityResult:
    """Make the result for `tokens` predicted tokens whose -ln probabilities sum to `nats`."""
    nll = nats / tokens
    bits = None if n_bytes is None else nats / math.log(2) / n_bytes
    return PerplexityResult(ppl=_exp(nll), nll_mean=nll, tokens=tokens, bits_per_byte=bits, seconds=seconds)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf  # beyond, a float overflows


def predicted_bytes(tokenizer: Any, windows: Tensor) -> int:
    """UTF-8 bytes of the text that tokens 1..S-1 of each window (W, S) stand for.

    The first token's bytes are subtracted from the window's. A space that the decoder strips at the start is then
    counted in neither. A character that a window's edge cuts counts as the replacement character's 3 bytes.
    """

    def size(ids: Tensor) -> int:
        return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())

    return sum(size(window) - size(window[:1]) for window in windows)
