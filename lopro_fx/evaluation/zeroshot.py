"""Multiple-choice accuracy without examples, by the conventions of EleutherAI's lm-evaluation-harness.

A scorer program (`export_scorer`) takes all endings of an item in one forward pass: the tokens that they share come
once, then each ending's own as a branch. Positions restart with each branch, and the mask lets a token see the shared
part and its own branch only. Every ending then gets the logits of a pass of its own. A program that takes token ids
only, such as that of a saved folder, needs a pass for each (`branched=False`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.evaluation.likelihood import continuation
from lopro_fx.progress import Progress, silent
from lopro_fx.tokens import require_known


@dataclass(frozen=True)
class Choice:
    """One possible answer: the text given, and the text whose probability counts."""

    context: str
    ending: str


@dataclass(frozen=True)
class Item:
    """One question: at least two choices and the index of the right one."""

    id: int | str
    choices: tuple[Choice, ...]
    label: int


@dataclass(frozen=True)
class ZeroShotResult:
    """acc: share of items whose right ending has the highest sum of log-probabilities; acc_norm: the same per UTF-8
    byte of the ending; acc_stderr: standard error of acc; items: how many; seconds: wall time."""

    acc: float
    acc_norm: float
    acc_stderr: float
    items: int
    seconds: float


def read_task(path: str | Path, limit: int | None = None) -> list[Item]:
    """Read a task, one JSON object a line: `id`, `ctx`, `endings`, `label`; or, for partial scoring as in WinoGrande,
    `id`, `ctxs`, `suffix`, `label`. `limit`: number of items to read, the first ones.

    An ending that doesn't start with a space gets one. Raises: ConfigError if the file can't be read or a line is not
    such an object.
    """
    items = []
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(items) == limit:
                    break
                if line.strip():
                    items.append(_parse(line, f"{path}:{number}"))
    except OSError as error:
        raise ConfigError(f"task {path} can't be read ({error.strerror}): give a .jsonl file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"task {path} is not UTF-8: give a .jsonl file") from error
    if not items:
        raise ConfigError(f"task {path} holds no items: give a .jsonl file, and a limit of at least 1")
    return items


def zero_shot(
    scorer: Callable[..., Tensor],
    tokenizer: Any,
    items: Sequence[Item],
    *,
    branched: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> ZeroShotResult:
    """Measure a scorer program's accuracy on a task.

    Args:
        scorer: what `export_scorer` returns, as a callable (its `.module()`); without `branched`, what
            `export_causal_lm` returns, or any callable (1, S) token ids -> (1, S, vocabulary) logits.
        tokenizer: the model's Hugging Face tokenizer.
        items: the questions (`read_task`).
        branched: all endings of an item in one pass, or one pass for each.
        dtype: the mask's type, that of the model's activations.
        device: where the model is.
        progress: called after each item with (items done, all items, the accuracy so far).

    Raises: ConfigError if there are no items or an ending has no tokens; ModelError if logits are not finite.
    """
    if not items:
        raise ConfigError("no items to score: give at least one")
    for item in items:
        for choice in item.choices:
            require_known(scorer, _encode(tokenizer, choice, item.id)[0], f"item {item.id}")
    started = time.perf_counter()
    right = right_norm = 0
    for done, item in enumerate(items, 1):
        scores = score_item(scorer, tokenizer, item, branched=branched, dtype=dtype, device=device)
        sizes = torch.tensor(
            [max(1, len(choice.ending.lstrip().encode())) for choice in item.choices], dtype=torch.int64, device="cpu"
        )
        right += int(scores.argmax()) == item.label
        right_norm += int((scores / sizes).argmax()) == item.label
        progress(done, len(items), f"accuracy {right / done:.3f}")
    acc, count = right / len(items), len(items)
    return ZeroShotResult(
        acc=acc,
        acc_norm=right_norm / count,
        acc_stderr=math.sqrt(acc * (1 - acc) / max(1, count - 1)),
        items=count,
        seconds=time.perf_counter() - started,
    )


def score_item(
    scorer: Callable[..., Tensor],
    tokenizer: Any,
    item: Item,
    *,
    branched: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sum of the log-probabilities (nats) of each choice's ending given its context: (choices,) float64, on the CPU.

    Arguments as in `zero_shot`. Raises: ConfigError if an ending has no tokens; ModelError if logits are not finite.
    """
    pairs = [_encode(tokenizer, choice, item.id) for choice in item.choices]
    if branched:
        scores = _one_pass(scorer, pairs, dtype, device)
    else:
        scores = torch.tensor(
            [continuation(scorer, *pair, device)[0] for pair in pairs], dtype=torch.float64, device="cpu"
        )
    if not scores.isfinite().all():
        raise ModelError(f"item {item.id}: the log-probabilities are not finite: check the model's weights")
    return scores


def _one_pass(
    scorer: Callable[..., Tensor], pairs: list[tuple[list[int], int]], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Score pairs (tokens, how many of them are given) in one pass: sums of log-probabilities (choices,)."""
    shared = min(given for _, given in pairs)
    shared = next((p for p in range(shared) if len({ids[p] for ids, _ in pairs}) > 1), shared)
    ids = list(pairs[0][0][:shared])
    positions, branch = list(range(shared)), [-1] * shared
    keep: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for index, (tokens, given) in enumerate(pairs):
        start = len(ids) - shared  # a token of this branch at position p stands at index start + p
        ids += tokens[shared:]
        positions += range(shared, len(tokens))
        branch += [index] * (len(tokens) - shared)
        keep += [p - 1 if p == shared else start + p - 1 for p in range(given, len(tokens))]
        targets += tokens[given:]
        owner += [index] * (len(tokens) - given)
    inputs = (_ids([ids]), _ids([positions]), _mask(_ids(branch), dtype), _ids(keep))
    with torch.no_grad():
        logits = scorer(*(tensor.to(device) for tensor in inputs)).float()
        logp = logits.log_softmax(-1).cpu().gather(1, _ids(targets)[:, None])[:, 0].double()
    return torch.zeros(len(pairs), dtype=torch.float64, device="cpu").index_add_(0, _ids(owner), logp)


def _ids(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _mask(branch: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, S, S): 0 where the query (row) may see the key, the type's lowest value elsewhere; branch -1 is shared."""
    order = torch.arange(len(branch), dtype=torch.int64, device="cpu")
    seen = (order[:, None] >= order) & ((branch[:, None] == branch) | (branch == -1))
    return torch.zeros(seen.shape, dtype=dtype, device="cpu").masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


def _encode(tokenizer: Any, choice: Choice, item_id: int | str) -> tuple[list[int], int]:
    """Return (tokens of context + ending, how many are given). As in lm-eval's `_encode_pair`, spaces at the context's
    end belong to the ending; both are tokenised as one text, cut after as many tokens as the context has alone."""
    context = choice.context.rstrip()
    ending = choice.context[len(context) :] + choice.ending
    given = tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = tokenizer(context + ending, add_special_tokens=False)["input_ids"]
    if not given:  # nothing to condition on: the token that starts a text stands in
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ConfigError(f"item {item_id}: no context, and the tokenizer has no BOS or EOS token: give a context")
        given, whole = [start], [start, *whole]
    if len(whole) <= len(given):
        raise ConfigError(f"item {item_id}: ending {choice.ending!r} has no tokens of its own: remove the item")
    return whole, len(given)


def _parse(line: str, where: str) -> Item:
    try:
        row = json.loads(line)
        if "ctxs" in row:
            choices = tuple(Choice(ctx, _spaced(row["suffix"])) for ctx in row["ctxs"])
        else:
            choices = tuple(Choice(row["ctx"], _spaced(ending)) for ending in row["endings"])
        item = Item(row["id"], choices, row["label"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: not an object with id, ctx, endings, label ({error}): mend the line") from error
    if len(choices) < 2 or item.label not in range(len(choices)):
        raise ConfigError(f"{where}: label {item.label} of {len(choices)} endings: an index of 2 or more is needed")
    return item


def _spaced(ending: str) -> str:
    return ending if ending[:1].isspace() else " " + ending
