"""Text from a program that takes token ids and returns logits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx.errors import ConfigError, ModelError


@torch.no_grad()
def generate(
    program: ExportedProgram | Callable[[Tensor], Tensor],
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] | None = None,
    stream: Callable[[str], None] | None = None,
) -> str:
    """Continue `prompt`.

    The whole prefix runs again for every token, since the program keeps no KV cache: time grows with the square of the
    length, which suits a few sentences.

    Args:
        program: token ids (1, S) int64 -> logits (1, S, vocabulary), S dynamic; a program or anything callable, such as
            a loaded AOTInductor package.
        tokenizer: of Hugging Face, or with its `__call__`, `decode` and `eos_token_id`.
        prompt: text; no chat template is put around it.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        seed: of the draws.
        stop: token ids that end the text; by default the tokenizer's end-of-sequence token.
        stream: called with each piece of text as it comes; the pieces together are the result.

    Returns:
        The text added, without the prompt.

    Raises:
        ConfigError: the prompt has no token, or a number is out of range.
        ModelError: logits are not finite.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: at least 1 is needed")
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature:g}: must be 0 (greedy) or above")
    ids = list(tokenizer(prompt)["input_ids"]) if prompt else []
    if not ids:
        raise ConfigError("the prompt is empty: give at least one character to continue")
    end = {tokenizer.eos_token_id} if stop is None else set(stop)
    run = program.module() if isinstance(program, ExportedProgram) else program
    generator = torch.Generator().manual_seed(seed)
    start, text = len(ids), ""
    for _ in range(max_new_tokens):
        token = _pick(run(torch.tensor([ids]))[0, -1].float().cpu(), temperature, generator)
        if token in end:
            break
        ids.append(token)
        grown = _text(tokenizer, ids, start)
        # A character whose bytes are spread over tokens shows as U+FFFD until its last one is there.
        if stream and not grown.endswith("\ufffd"):
            stream(grown[len(text) :])
            text = grown
    grown = _text(tokenizer, ids, start)
    if stream and len(grown) > len(text):
        stream(grown[len(text) :])
    return grown


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if not torch.isfinite(logits).all():
        raise ModelError("the model's logits are not finite: check its weights, or use a wider dtype")
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))


def _text(tokenizer: Any, ids: list[int], start: int) -> str:
    """Text of the new tokens as it continues the prompt: decoders drop a space at the start of what they are given."""
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    return whole[len(tokenizer.decode(ids[:start], skip_special_tokens=True)) :]
