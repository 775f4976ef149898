"""Time of prefill and decode of anything that generates."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch

from lopro_fx.errors import ConfigError
from lopro_fx.generation.generator import TokenModel
from lopro_fx.progress import Progress, silent


@dataclass(frozen=True)
class Speed:
    """Seconds of every repeat: of the prompt's pass, of that pass and the choice of the first token, and of the
    `new_tokens` decode steps after it, each with its choice. The rest are medians; tokens count all rows."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: tuple[float, ...]
    first_token_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.batch * self.prompt_tokens / median(self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        return self.batch * self.new_tokens / median(self.decode_seconds)

    @property
    def first_token(self) -> float:
        """Median seconds to the first token."""
        return median(self.first_token_seconds)


def measure_speed(
    model: TokenModel,
    *,
    vocabulary: int,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    repeats: int = 7,
    progress: Progress = silent,
) -> Speed:
    """Time greedy generation after random prompts; one run before the others is not counted.

    Args:
        model: what is measured, `model.batch_size` rows at a time.
        vocabulary: prompts are drawn below it.
        prompt_tokens, new_tokens: tokens a row of the prompt, and decode steps after the first token.
        repeats: runs that count.
        progress: called after each run with (runs done, runs, its decode speed).

    Raises:
        ConfigError: a number is below 1, or the tokens don't fit the cache.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise ConfigError(f"{name}={value}: at least 1 is needed")
    batch = model.batch_size
    prompt = torch.randint(
        vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu"
    )
    prefill, first, decode = [], [], []
    for run in range(repeats + 1):
        model.reset()
        started = time.perf_counter()
        logits = model.prefill(prompt)
        _wait(logits)
        prefilled = time.perf_counter()
        tokens = logits.argmax(-1, keepdim=True).cpu()
        chosen = time.perf_counter()
        for _ in range(new_tokens):
            tokens = model.decode(tokens).argmax(-1, keepdim=True).cpu()
        ended = time.perf_counter()
        if run:
            prefill.append(prefilled - started)
            first.append(chosen - started)
            decode.append(ended - chosen)
        progress(run + 1, repeats + 1, f"{batch * new_tokens / (ended - chosen):.1f} tokens/s")
    return Speed(batch, prompt_tokens, new_tokens, tuple(prefill), tuple(first), tuple(decode))


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
