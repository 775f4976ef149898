"""Divergence of a program's predictions from another's: KL divergence, agreement, ratio of perplexities.

The measures are those of llama.cpp's `--kl-divergence`, here over all predicted tokens of each window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.evaluation.perplexity import PerplexityResult, perplexity_of, require_windows
from lopro_fx.progress import Progress, silent
from lopro_fx.tokens import require_known

_ROWS = 64  # tokens whose log-probabilities under both programs are held in float64 at a time


@dataclass(frozen=True)
class DivergenceResult:
    """Comparison of a program with the original on the same tokens. Standard errors take tokens as independent.

    `program`, `original`: perplexity of each. `kl_mean`, `kl_stderr`, `kl_median`, `kl_p99`, `kl_max`: of
    D(original || program), nats a token. `top1`, `top1_stderr`: share of tokens for which both find the same token
    likeliest. `ln_ppl_ratio`, `ln_ppl_ratio_stderr`: ln(perplexity / original perplexity), whose error is much smaller
    than that of either perplexity, since both models find the same tokens hard. `ppl_ratio`: its exponential.
    """

    program: PerplexityResult
    original: PerplexityResult
    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: float
    top1_stderr: float
    ln_ppl_ratio: float
    ln_ppl_ratio_stderr: float
    ppl_ratio: float


def divergence(
    program: Callable[[Tensor], Tensor],
    original: Callable[[Tensor], Tensor],
    windows: Tensor,
    *,
    n_bytes: int | None = None,
    progress: Progress = silent,
    device: torch.device | str = "cpu",
) -> DivergenceResult:
    """Compare two programs on `windows` (W, S) int64: in each, tokens 1..S-1 are predicted from those before them.

    One window runs at a time through both, so memory does not grow with W; log-probabilities are taken in float64.

    Args:
        program: (1, S) token ids -> (1, S, vocabulary) logits; an exported program's `.module()` or any callable.
        original: the same, of the model that `program` stands for.
        windows: as `token_windows` makes them; S >= 2.
        n_bytes: UTF-8 bytes of the predicted tokens' text (`predicted_bytes`), for bits per byte.
        progress: called after each window with (windows done, W, the mean divergence so far).
        device: where both programs run.

    Raises: ConfigError if there is nothing to predict or the vocabularies differ; ModelError if logits are not finite.
    """
    require_windows(windows)
    for run in (program, original):
        require_known(run, windows, "the text to evaluate on")
    if windows[:, 1:].numel() < 2:
        raise ConfigError(f"windows of shape {tuple(windows.shape)} predict one token: 2 are needed for an error")
    pieces: list[Tensor] = []
    seconds = [0.0, 0.0]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for index, window in enumerate(windows):
            logits = []
            for which, run in enumerate((program, original)):
                started = time.perf_counter()
                logits.append(run(window[None].to(device))[0, :-1])
                seconds[which] += time.perf_counter() - started
            measured = token_divergence(logits[0], logits[1], window[1:])
            if not measured.isfinite().all():
                raise ModelError(f"window {index}: the log-probabilities are not finite: check the models' weights")
            pieces.append(measured)
            total, tokens = total + measured[0].sum().item(), tokens + measured.shape[1]
            progress(index + 1, len(windows), f"divergence {total / tokens:.4f}")
    kl, nll, nll_original, same = torch.cat(pieces, 1)
    ratio = nll - nll_original
    return DivergenceResult(
        program=perplexity_of(nll.sum().item(), tokens, n_bytes, seconds[0]),
        original=perplexity_of(nll_original.sum().item(), tokens, n_bytes, seconds[1]),
        kl_mean=kl.mean().item(),
        kl_stderr=_stderr(kl),
        kl_median=_quantile(kl, 0.5),
        kl_p99=_quantile(kl, 0.99),
        kl_max=kl.max().item(),
        top1=same.mean().item(),
        top1_stderr=_stderr(same),
        ln_ppl_ratio=ratio.mean().item(),
        ln_ppl_ratio_stderr=_stderr(ratio),
        ppl_ratio=math.exp(min(700.0, ratio.mean().item())),
    )


def token_divergence(logits: Tensor, original: Tensor, targets: Tensor) -> Tensor:
    """Compare by token: (4, N) float64 on the CPU. Rows are D(original || program) in nats, -ln of the target's
    probability under the program and under the original, and 1 where the likeliest tokens agree, else 0.

    Args: logits, original: (N, V), any floating-point type. targets: (N,) int64.
    Raises: ConfigError if the two have different vocabularies.
    """
    if logits.shape != original.shape:
        raise ConfigError(
            f"the program has {logits.shape[-1]} logits a token and the original {original.shape[-1]}: "
            "compare models with the same vocabulary"
        )
    pieces = []
    for rows, others, wanted in zip(logits.split(_ROWS), original.split(_ROWS), targets.split(_ROWS), strict=True):
        logq, logp = rows.double().log_softmax(-1), others.to(rows.device).double().log_softmax(-1)
        wanted = wanted.to(rows.device)[:, None]
        # A token that the original rules out (probability 0) adds nothing, whatever the program says.
        kl = (logp.exp() * (logp - logq)).masked_fill(logp == -math.inf, 0).sum(-1)
        same = (logq.argmax(-1) == logp.argmax(-1)).double()
        pieces.append(torch.stack((kl, -logq.gather(1, wanted)[:, 0], -logp.gather(1, wanted)[:, 0], same)).cpu())
    return torch.cat(pieces, 1)


def _stderr(values: Tensor) -> float:
    return values.std(correction=1).item() / math.sqrt(len(values))


def _quantile(values: Tensor, share: float) -> float:
    """Interpolate linearly between the two nearest values; `torch.quantile` takes at most 16 million values."""
    place = share * (len(values) - 1)
    ordered = values.sort().values
    low = math.floor(place)
    return torch.lerp(ordered[low], ordered[math.ceil(place)], place - low).item()
