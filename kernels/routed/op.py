"""Registration of `lopro::routed_linear`: unquantised experts, the form that passes bring every spelling of them to.

It stays one node: which rows an expert has is known only at run time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lopro_fx.kernels import registry
from lopro_fx.kernels.routed.reference import routed_linear


def _fake(x: Tensor, ids: Tensor, weight: Tensor, slots: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(ids.shape[0], weight.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, ids, weight, ctx.slots = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, ids, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    x, ids, weight = ctx.saved_tensors
    of_x = of_weight = None
    if ctx.needs_input_grad[0]:
        each = torch.ops.lopro.routed_linear(gradient.contiguous(), ids, weight.mT, 1)
        of_x = each.unflatten(0, (-1, ctx.slots)).sum(1)
    if ctx.needs_input_grad[2]:
        # Not by rows of an expert: a compiler traces this, and doesn't know how many there are.
        each, mine = x.repeat_interleave(ctx.slots, 0), torch.nn.functional.one_hot(ids.long(), weight.shape[0])
        of_weight = torch.stack([(gradient * own.unsqueeze(1)).T @ each for own in mine.to(gradient.dtype).unbind(1)])
    return of_x, None, of_weight, None


registry.register_opaque(
    "routed_linear(Tensor x, Tensor ids, Tensor weight, int slots) -> Tensor", routed_linear, _fake, (_backward, _save)
)
