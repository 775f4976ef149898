"""Refuse token ids that a model doesn't know, before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from lopro_fx.errors import ConfigError
from lopro_fx.passes.lookups import size_ranges, table_rows, user_placeholders


def require_known(program: ExportedProgram | Callable[..., Any], ids: Tensor | Iterable[int], what: str) -> None:
    """Check token ids against the embedding table of `program`, if its graph shows one.

    Args:
        program: exported, or its `.module()`; anything else is not checked.
        ids: int64 of any shape, or numbers.
        what: name of the ids in an error.

    Raises:
        ConfigError: names an id that the table lacks.
    """
    if isinstance(program, (ExportedProgram, GraphModule)):
        require_below(table_rows(program), ids, what)


def require_length(program: ExportedProgram, length: int, what: str) -> None:
    """Check that `program`, whose first input is token ids (..., S), was exported for sequences of this length.

    Raises:
        ConfigError: names the lengths that it was exported for.
    """
    ids = user_placeholders(program)[0]
    low, high = size_ranges(program, ids)[-1]
    if not low <= length <= high:
        raise ConfigError(f"{what} {length}: the model was exported for {max(low, 1):g} to {high:g} tokens a window")


def require_below(rows: int | None, ids: Tensor | Iterable[int], what: str) -> None:
    """As `require_known`, for a table of `rows` rows; None checks nothing."""
    if rows is None:
        return
    if isinstance(ids, Tensor):
        ids = (int(ids.min()), int(ids.max())) if ids.numel() else ()
    wrong = next((token for token in ids if not 0 <= token < rows), None)
    if wrong is not None:
        raise ConfigError(
            f"{what} holds the token id {wrong}, and the model's embedding has {rows} rows: use the tokenizer that the "
            "model was trained with"
        )
