"""Names of packed tensors in files, where they differ from those in the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming

from lopro_fx.huggingface.modules import PackedWeight

# A reader that doesn't know the format stops at the shape of a `weight`, instead of taking the layer for one without
# weights and filling it with random ones.
STORED, HELD = "weight", "codes"


class CodesRenaming(WeightRenaming):
    """From `weight` in files to `codes` in the model, for the modules of these names; reversed, the way back."""

    __slots__ = ("_ends", "_owners")

    def __init__(self, owners: Collection[str], ends: tuple[str, str] = (STORED, HELD)) -> None:
        super().__init__(*ends)
        self._owners, self._ends = frozenset(owners), ends

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        owner, _, key = source_key.rpartition(".")
        if key != self._ends[0] or owner not in self._owners:
            return source_key, None
        self._was_used = True
        return f"{owner}.{self._ends[1]}", key

    def reverse_transform(self) -> CodesRenaming:
        return CodesRenaming(self._owners, (self._ends[1], self._ends[0]))


def codes_renaming(model: Any) -> CodesRenaming:
    """For a model with packed modules; files may hold names with or without the prefix of the base model."""
    owners = [
        name for name, module in model.named_modules() if isinstance(module, PackedWeight) and HELD in module.dtypes
    ]
    prefix = f"{model.base_model_prefix}."
    return CodesRenaming(
        {*owners, *(prefix + name for name in owners), *(name.removeprefix(prefix) for name in owners)}
    )


def rename_on_saving(model: Any) -> None:
    """Make `save_pretrained` write the names of files, for a model that wasn't loaded with `codes_renaming`."""
    known = getattr(model, "_weight_conversions", None)
    if known is None:
        # As transformers does for a model that it didn't load.
        known = [entry for entry in get_model_conversion_mapping(model, add_legacy=False)
                 if not isinstance(entry, PrefixChange)]  # fmt: skip
    model._weight_conversions = [*known, codes_renaming(model)]
