"""Generate text with a program that takes token ids and returns logits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, overload

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx.errors import ConfigError
from lopro_fx.generation.generator import Generator, Recompute, TokenModel
from lopro_fx.generation.programs import GenerationPrograms
from lopro_fx.generation.sampling import Sampler
from lopro_fx.tokens import require_below

Model = ExportedProgram | GenerationPrograms | Generator | Callable[[Tensor], Tensor]


@overload
def generate(
    program: Model, tokenizer: Any, prompt: str, max_new_tokens: int = ..., *, temperature: float = ...,
    top_k: int = ..., top_p: float = ..., seed: int = ..., stop: Collection[int] | None = ...,
    stream: Callable[[str], None] | None = ...,
) -> str: ...  # fmt: skip
@overload
def generate(
    program: Model, tokenizer: Any, prompt: Sequence[str], max_new_tokens: int = ..., *, temperature: float = ...,
    top_k: int = ..., top_p: float = ..., seed: int = ..., stop: Collection[int] | None = ...,
    stream: Callable[[str], None] | None = ...,
) -> list[str]: ...  # fmt: skip
def generate(
    program: Model,
    tokenizer: Any,
    prompt: str | Sequence[str],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] | None = None,
    stream: Callable[[str], None] | None = None,
) -> str | list[str]:
    """Continue a prompt, or several together.

    Args:
        program: a `Generator` (see `load_package`) or `GenerationPrograms`, which have a KV cache. Or a program without
            one, token ids (1, S) int64 -> logits (1, S, vocabulary), which runs the whole prefix again for every token;
            that suits a few sentences.
        tokenizer: of Hugging Face, or with its `__call__`, `decode` and `eos_token_id`.
        prompt: text; no chat template is put around it. Several need a batch size of at least as many, and are padded
            on the left.
        max_new_tokens: most tokens to add.
        temperature, top_k, top_p, seed: see `Sampler`; by default the likeliest token is taken.
        stop: token ids that end a text; by default the tokenizer's end-of-sequence token.
        stream: called with each piece of text as it comes; the pieces together are the result. One prompt only.

    Returns:
        The text added, without the prompt; a list for a list. A text that fills the cache ends there, with a warning.

    Raises:
        ConfigError: a prompt is empty, holds an unknown token or doesn't fit the cache; there are more prompts than
            rows; or a number is out of range.
        ModelError: logits are not finite.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: at least 1 is needed")
    sampler = Sampler(temperature, top_k, top_p, seed)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if stream and len(prompts) != 1:
        raise ConfigError(f"{len(prompts)} prompts can't be streamed together; stream one, or none")
    ids = [list(tokenizer(text)["input_ids"]) if text else [] for text in prompts]
    if not ids or not all(ids):
        raise ConfigError("the prompt is empty: give at least one character to continue")
    model = _token_model(program)
    for row in ids:
        require_below(model.rows, row, "the prompt")
    end = {tokenizer.eos_token_id} if stop is None else set(stop)
    texts = [_Text(tokenizer, row) for row in ids]
    # Threads that share a generator share its cache.
    with model.lock if isinstance(model, Generator) else nullcontext():
        for tokens in _tokens(model, ids, max_new_tokens, sampler, end):
            for text, token in zip(texts, tokens, strict=True):
                if token is not None:
                    piece = text.add(token)
                    if stream and piece:
                        stream(piece)
    if stream and (rest := texts[0].rest()):
        stream(rest)
    results = [text.text() for text in texts]
    return results[0] if isinstance(prompt, str) else results


def _token_model(program: Model) -> TokenModel:
    if isinstance(program, GenerationPrograms):
        return Generator.from_programs(program)
    return program if isinstance(program, Generator) else Recompute(program)


def _tokens(
    model: TokenModel, prompts: list[list[int]], count: int, sampler: Sampler, end: set[int]
) -> Iterator[list[int | None]]:
    """Yield the next token of each prompt, None where it has ended, until all have."""
    if len(prompts) > model.batch_size:
        raise ConfigError(
            f"{len(prompts)} prompts for a batch size of {model.batch_size}: export with batch_size={len(prompts)}"
        )
    # Surplus rows repeat the first prompt; their tokens are dropped.
    rows = prompts + [prompts[0]] * (model.batch_size - len(prompts))
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    room = getattr(model, "max_cache_len", math.inf)
    if length > room:
        raise ConfigError(f"the prompt has {length} tokens, and there is room for {room:g}: give a shorter one")
    ids = torch.tensor(
        [[row[0]] * pad + row for row, pad in zip(rows, padding, strict=True)], dtype=torch.int64, device="cpu"
    )
    model.reset()
    logits = model.prefill(ids, torch.tensor(padding, dtype=torch.int64, device="cpu") if any(padding) else None)
    ended = [False] * len(prompts)
    for index in range(count):
        tokens = sampler.pick(logits)
        chosen = tokens.tolist()[: len(prompts)]
        ended = [over or token in end for over, token in zip(ended, chosen, strict=True)]
        if all(ended):
            return
        yield [None if over else token for over, token in zip(ended, chosen, strict=True)]
        if index + 1 < count:
            if length + index + 1 > room:
                warnings.warn(
                    f"the room for {room:g} tokens, prompt included, is full: the text ends after {index + 1} of "
                    f"{count} tokens; a larger max_cache_len has more, up to the positions that the model knows",
                    stacklevel=4,
                )
                return
            logits = model.decode(tokens[:, None])


class _Text:
    """Text of one prompt's new tokens, so far."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer, self._ids, self._start, self._shown = tokenizer, list(prompt), len(prompt), ""

    def text(self) -> str:
        """Decode with the prompt, then cut it off: decoders drop a space at the start of their input."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return whole[len(self._tokenizer.decode(self._ids[: self._start], skip_special_tokens=True)) :]

    def add(self, token: int) -> str:
        """Add a token, and return what it adds to the text shown so far."""
        self._ids.append(token)
        grown = self.text()
        # A character whose bytes are spread over tokens shows as U+FFFD until its last one is there.
        return "" if grown.endswith("\ufffd") else self._show(grown)

    def rest(self) -> str:
        """Return the text that was held back."""
        return self._show(self.text())

    def _show(self, grown: str) -> str:
        piece, self._shown = grown[len(self._shown) :], grown
        return piece
