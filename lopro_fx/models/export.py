"""Exports a Hugging Face causal language model as a program with plain tensors in and out.

The program's weights keep the names that they have in the model (`model.layers.0.self_attn.q_proj.weight`), whichever
of the two functions made it, so that one quantisation state fits both programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from lopro_fx.errors import ModelError, first_line


def export_causal_lm(model: nn.Module, *, example_length: int = 8) -> ExportedProgram:
    """Exports `input_ids` (batch, sequence) int64 -> logits (batch, sequence, vocabulary), both sizes dynamic, from 1.

    No KV cache, no padding: each token sees itself and those before it. `example_length`: tokens in the traced example,
    at least 2.

    Raises: ModelError if torch.export can't trace the model.
    """
    plain_forward = type(model).forward

    def forward(self: Any, input_ids: Tensor) -> Tensor:
        return plain_forward(self, input_ids=input_ids, use_cache=False).logits

    example = (torch.zeros(2, max(example_length, 2), dtype=torch.int64, device="cpu"),)
    shapes = {"input_ids": {0: Dim("batch", min=1), 1: Dim("sequence", min=1)}}
    return export_view(model, forward, example, shapes)


def export_scorer(model: nn.Module) -> ExportedProgram:
    """Exports the program that scores several continuations of one text in one pass (see `evaluation.zeroshot`).

    Inputs: `input_ids` (1, S) int64; `position_ids` (1, S) int64; `mask` (1, 1, S, S), of the model's dtype, added to
    the attention scores, row = query; `keep` (K,) int64, the positions whose logits are wanted. Output: logits (K,
    vocabulary). S >= 2 and K >= 1 are dynamic. The mask replaces the model's own, a sliding window included.

    Raises: ModelError if torch.export can't trace the model, e.g. one whose forward takes no `position_ids`.
    """
    plain_forward = type(model).forward

    def forward(self: Any, input_ids: Tensor, position_ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
        output = plain_forward(
            self,
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=keep,
        )
        return output.logits[0]

    size = 8
    dtype = next(model.parameters()).dtype
    example = (
        torch.zeros(1, size, dtype=torch.int64, device="cpu"),
        torch.arange(size, dtype=torch.int64, device="cpu")[None],
        torch.zeros(1, 1, size, size, dtype=dtype, device="cpu"),
        torch.arange(size // 2, dtype=torch.int64, device="cpu"),
    )
    sequence = Dim("sequence", min=2)
    shapes = {
        "input_ids": {1: sequence},
        "position_ids": {1: sequence},
        "mask": {2: sequence, 3: sequence},
        "keep": {0: Dim("kept", min=1)},
    }
    return export_view(model, forward, example, shapes)


def export_view(
    model: nn.Module, forward: Callable[..., Tensor], example: tuple[Any, ...], shapes: dict[str, Any]
) -> ExportedProgram:
    """Exports a model with `forward(self, …)` in place of its own.

    Args:
        example: positional inputs of `forward`, tensors or lists of them, on any device.
        shapes: dynamic sizes by the name of the input, as in `torch.export.export`.

    Raises: ModelError if torch.export can't trace the model.
    """
    # A wrapper module would put its attribute's name before every weight's. This is the model itself, under a subclass
    # with another forward: the same modules, parameters and names, nothing copied.
    kind = type(model)
    view = kind.__new__(type(kind.__name__, (kind,), {"forward": forward}))
    view.__dict__.update(model.__dict__)
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            example = tree_map(lambda tensor: tensor.to(device), example)
            # torch 2.11 can't see that min(8 s, 16 s) is 8 s where keys are repeated: it shall check that, not refuse.
            return torch.export.export(
                view, example, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
            )
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise ModelError(f"{kind.__name__} can't be exported: {first_line(error)}") from error
