"""Padding: tokens that a batch's attention mask hides, which are no text and must not count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx.passes.lookups import user_placeholders

_NAME = "attention_mask"


class Padding:
    """The masks of one batch: inputs (batch, sequence), integer or bool, whose names end with `attention_mask`."""

    def __init__(self, program: ExportedProgram, batch: Sequence[Any]) -> None:
        named = zip(user_placeholders(program), batch, strict=True)
        masks = [value for node, value in named if node.name.endswith(_NAME) and isinstance(value, Tensor)]
        self._masks = [mask != 0 for mask in masks if mask.dim() == 2 and not mask.is_floating_point()]

    @property
    def hides_all(self) -> bool:
        """Whether a mask shows no token."""
        return any(not mask.any() for mask in self._masks)

    def of_pairs(self, rows: int) -> Tensor | None:
        """`visible` of a value with a row for each token and expert, a token's rows beside one another."""
        slots = [rows // mask.numel() for mask in self._masks if mask.numel() and rows % mask.numel() == 0]
        found = self.visible((rows // slots[0],)) if slots and slots[0] else None
        return None if found is None else found.repeat_interleave(slots[0])

    def visible(self, lead: Sequence[int]) -> Tensor | None:
        """Return bool (tokens,), True for the tokens of a value (*lead, features) that are text.

        None where all count: nothing is hidden, no mask has this shape, or several that do differ.
        """
        fits = [mask for mask in self._masks if tuple(lead) in (tuple(mask.shape), (mask.numel(),))]
        if not fits or fits[0].all() or any(not torch.equal(mask, fits[0]) for mask in fits[1:]):
            return None
        return fits[0].flatten()


def kept(rows: Tensor, visible: Tensor | None) -> Tensor:
    """Drop hidden tokens from `rows` (tokens, ...)."""
    return rows if visible is None else rows[visible.to(rows.device)]
