"""Log-probability of a text's continuation under a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lopro_fx.tokens import require_known

_ROWS = 128  # logits that are turned into log-probabilities at a time


def continuation(
    program: Callable[[Tensor], Tensor], tokens: Sequence[int], given: int, device: torch.device | str = "cpu"
) -> tuple[float, bool]:
    """Return (sum of the log-probabilities in nats of tokens from index `given` on, whether each is the likeliest).

    Args:
        program: (1, S) token ids -> (1, S, vocabulary) logits.
        tokens: the whole text; the last token needs no pass.
        given: how many of `tokens` are context, at least 1 and fewer than all.
        device: where the program runs.

    Raises: ConfigError if a token is none of the model's.
    """
    require_known(program, tokens, "the text to score")
    total, greedy = 0.0, True
    with torch.no_grad():
        logits = program(torch.tensor([tokens[:-1]], device=device, dtype=torch.int64))[0, given - 1 :]
        targets = torch.tensor(tokens[given:], device=logits.device, dtype=torch.int64)
        for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
            logp = rows.float().log_softmax(-1)
            total += logp.gather(1, wanted[:, None]).double().sum().item()
            greedy = greedy and bool((logp.argmax(-1) == wanted).all())
    return total, greedy
