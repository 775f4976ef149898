"""Export a Hugging Face causal language model as a program with plain tensors in and out.

The program's weights keep the names that they have in the model (`model.layers.0.self_attn.q_proj.weight`), whichever
of the two functions made it, so that one quantisation state fits both programs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from lopro_fx.errors import ModelError
from lopro_fx.models.masks import Form, Misuse, check_masks
from lopro_fx.models.positions import own_window, positions_given, table_limit
from lopro_fx.models.routed import routed_experts_in

_TRIES = 3
_SUGGESTION = re.compile(r"(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)")
_HINT = ' For more information, run with TORCH_LOGS="+dynamic".'
_LONGEST = 1000


def export_causal_lm(model: nn.Module, *, example_length: int = 8) -> ExportedProgram:
    """Export `input_ids` (batch, sequence) int64 -> logits (batch, sequence, vocabulary), both sizes dynamic, from 1.

    No KV cache, no padding: each token sees itself and those before it. `example_length`: tokens in the traced example,
    at least 2. A model with a table of positions takes sequences up to its length.

    Raises: ModelError if torch.export can't trace the model.
    """
    plain_forward = type(model).forward

    def forward(self: Any, input_ids: Tensor) -> Tensor:
        return plain_forward(self, input_ids=input_ids, use_cache=False).logits

    limit = table_limit(model)
    example = (torch.zeros(2, max(min(example_length, limit or example_length), 2), dtype=torch.int64, device="cpu"),)
    shapes = {"input_ids": {0: Dim("batch", min=1), 1: Dim("sequence", min=1, max=limit)}}
    return export_view(model, forward, example, shapes)


def export_scorer(model: nn.Module) -> ExportedProgram:
    """Export the program that scores several continuations of one text in one pass (see `evaluation.zeroshot`).

    Inputs: `input_ids` (1, S) int64; `position_ids` (1, S) int64; `mask` (1, 1, S, S), of the model's dtype, added to
    the attention scores, row = query; `keep` (K,) int64, the positions whose logits are wanted. Output: logits (K,
    vocabulary). S >= 2 and K >= 1 are dynamic. The mask replaces the model's own, a sliding window included. A window
    that the model stores as a table (GPT-Neo) can't be replaced: it limits S.

    Raises: ModelError if torch.export can't trace the model, or the model doesn't add the mask to its scores.
    """
    plain_forward = type(model).forward
    takes = inspect.signature(plain_forward).parameters
    keeps = "logits_to_keep" in takes

    def forward(self: Any, input_ids: Tensor, position_ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        kept = {"logits_to_keep": keep} if keeps else {}
        with positions_given(self, takes, position_ids) as positions:
            output = plain_forward(self, input_ids=input_ids, attention_mask=mask, use_cache=False, **positions, **kept)
        return output.logits[0] if keeps else output.logits[0, keep]

    limit = min((limit for limit in (table_limit(model), own_window(model)) if limit is not None), default=None)
    size = min(8, limit or 8)
    dtype = next(model.parameters()).dtype
    example = (
        torch.zeros(1, size, dtype=torch.int64, device="cpu"),
        torch.arange(size, dtype=torch.int64, device="cpu")[None],
        torch.zeros(1, 1, size, size, dtype=dtype, device="cpu"),
        torch.arange(size // 2, dtype=torch.int64, device="cpu"),
    )
    sequence = Dim("sequence", min=2, max=limit)
    shapes = {
        "input_ids": {1: sequence},
        "position_ids": {1: sequence},
        "mask": {2: sequence, 3: sequence},
        "keep": {0: Dim("kept", min=1)},
    }
    program = export_view(model, forward, example, shapes)
    try:
        check_masks(program, "mask", Form.ADDED, 1)
    except Misuse as error:
        raise ModelError(f"{type(model).__name__} can't be exported with a mask of its caller: {error}") from error
    return program


def export_view(
    model: nn.Module, forward: Callable[..., Tensor], example: tuple[Any, ...], shapes: dict[str, Any]
) -> ExportedProgram:
    """Export a model with `forward(self, …)` in place of its own, and experts of transformers as routed products.

    Args:
        example: positional inputs of `forward`, tensors or lists of them, on any device.
        shapes: dynamic sizes by the name of the input, as in `torch.export.export`. Ranges are narrowed where the model
            needs it.

    Raises: ModelError if torch.export can't trace the model, with its reason.
    """
    # A wrapper module would put its attribute's name before every weight's. This is the model itself, under a subclass
    # with another forward: the same modules, parameters and names, nothing copied.
    kind = type(model)
    view = kind.__new__(type(kind.__name__, (kind,), {"forward": forward}))
    view.__dict__.update(model.__dict__)
    device = next(model.parameters()).device
    example = tree_map(lambda tensor: tensor.to(device), example)
    tries = 0
    while True:
        tries += 1
        try:
            with torch.no_grad(), routed_experts_in(model):
                # torch 2.11 can't prove that min(8 s, 16 s) is 8 s where keys are repeated: without this it refuses
                # instead of checking at run time.
                return torch.export.export(
                    view, example, dynamic_shapes=shapes, strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )  # fmt: skip
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            narrowed = _narrowed(shapes, str(error)) if tries < _TRIES else None
            if narrowed is None:
                raise ModelError(f"{kind.__name__} can't be exported: {_reason(error)}") from error
            shapes = narrowed


def _narrowed(shapes: dict[str, Any], text: str) -> dict[str, Any] | None:
    """Apply the ranges that torch.export suggests in an error's text; None if they are no narrower."""
    found = {name: (low, high) for name, low, high in _SUGGESTION.findall(text)}
    changed = False

    def narrow(size: Any) -> Any:
        nonlocal changed
        if not isinstance(size, Dim) or size.__name__ not in found:
            return size
        low, high = (int(number) if number else None for number in found[size.__name__])
        low = size.min if low is None else max(low, size.min)
        high = size.max if high is None else min(high, size.max)
        changed |= (low, high) != (size.min, size.max)
        return Dim(size.__name__, min=low, max=high) if low < high else size

    narrowed = tree_map(narrow, shapes, is_leaf=lambda value: isinstance(value, Dim))
    return narrowed if changed else None


def _reason(error: BaseException) -> str:
    """Return torch.export's reason in one line, without its debugging hints."""
    lines = [line.strip() for line in str(error).partition("The error above occurred when calling")[0].splitlines()]
    text = " ".join(line for line in lines if line).replace(_HINT, "")
    return f"{text[:_LONGEST]}…" if len(text) > _LONGEST else text or type(error).__name__
