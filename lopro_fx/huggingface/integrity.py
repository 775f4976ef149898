"""Check the tensors in a folder's files, and what transformers makes of them, against the layout."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lopro_fx.errors import CheckpointError, first_line
from lopro_fx.huggingface.modules import PackedModule, PackedWeight
from lopro_fx.huggingface.renaming import PackedNames, forms, names_in_files
from lopro_fx.store.records import require_permutation

# Formats whose `scales` are not negative; others may have any.
_UNSIGNED = ("affine", "trellis")


@dataclass(frozen=True)
class Stored:
    """What the header of a file says of a tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_tensors(files: Iterable[str]) -> dict[str, Stored]:
    """Read the headers of safetensors files.

    Raises:
        CheckpointError: a file can't be read, or is shorter or longer than its header says.
    """
    found = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no dict
                    part = file.get_slice(name)
                    # Of no values, since safetensors has names of its own for dtypes.
                    dtype = (part[:0] if part.get_shape() else file.get_tensor(name)).dtype
                    found[name] = Stored(path, dtype, tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            reason = first_line(error)
            raise CheckpointError(f"{path} can't be read (damaged, truncated or missing): {reason}") from error
    return found


def require_layout(model: Any, stored: Mapping[str, Stored]) -> None:
    """Compare packed tensors with their modules, before transformers casts them.

    Raises:
        CheckpointError: a tensor has another dtype or shape.
    """
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        for key, named in names_in_files(name, module).items():
            found = next((form for form in forms(model, named) if form in stored), None)
            if found is None:
                continue
            have, (dtype, shape) = stored[found], (module.dtypes[key], tuple(getattr(module, key).shape))
            if (have.dtype, have.shape) != (dtype, shape):
                raise CheckpointError(
                    f"'{found}' in {have.file} is {have.dtype} {have.shape}, not {dtype} {shape}: save the model again"
                )


def refuse_missing(model: Any, names: PackedNames, files: Sequence[str]) -> None:
    """Make the model refuse, while transformers loads it, to replace missing tensors by new ones.

    The next `tie_weights` of the model that is given missing keys raises a CheckpointError if any remains after tying.
    """

    def tie_weights(missing_keys: set[str] | None = None, **options: Any) -> None:
        # Looked up here, since the class ties nothing while a model is made.
        type(model).tie_weights(model, missing_keys=missing_keys, **options)
        if missing_keys is not None:
            del model.tie_weights
            _require_complete(model, missing_keys, names, files)

    model.tie_weights = tie_weights


def require_values(name: str, module: PackedModule) -> None:
    """Check what a module called `name` was filled with, except what was left on the disk.

    Raises:
        CheckpointError: a tensor has another dtype, a scale is no number or negative, or a permutation is none.
    """
    names = names_in_files(name, module)
    for key, dtype in module.dtypes.items():
        tensor, stored = getattr(module, key), names[key]
        if tensor.dtype != dtype:
            raise CheckpointError(f"'{stored}' is {tensor.dtype}, not {dtype}: save the model again")
        if key == "perm":
            require_permutation(tensor, stored)
        if key.endswith(("scale", "scales")):
            unsigned = not isinstance(module, PackedWeight) or key == "up_scale" or module.layout.format in _UNSIGNED
            _require_scales(tensor, stored, unsigned)


def _require_scales(scales: Tensor, name: str, unsigned: bool) -> None:
    """Rows of zeros have scales of zero."""
    if scales.is_meta or not scales.numel():
        return
    # A NaN among the scales is both.
    low, high = (value.item() for value in scales.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(f"'{name}' holds a scale of {high if math.isfinite(low) else low}: save the model again")
    if unsigned and low < 0:
        raise CheckpointError(f"'{name}' holds a negative scale, {low}: save the model again")


def _require_complete(model: Any, missing: Iterable[str], names: PackedNames, files: Sequence[str]) -> None:
    patterns = model._keys_to_ignore_on_load_missing or ()
    missing = sorted(name for name in missing if not any(re.search(pattern, name) for pattern in patterns))
    others = {name for name in missing if name not in names.tensors}
    if others and type(model).__name__ not in (model.config.architectures or ()):
        written = _written_by(model)
        others = {name for name in others if name.removeprefix(f"{model.base_model_prefix}.") in written}
    stored = {after: before for before, after in names.renamed.items()}
    lost = [stored.get(name, name) for name in missing if name in names.tensors or name in others]
    if lost:
        where = f" in {Path(files[0]).parent}" if files else ""
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CheckpointError(f"the model's files{where} lack the tensor '{lost[0]}'{more}: save the model again")


def _written_by(model: Any) -> set[str]:
    """Names of the tensors of the model that was saved, without the base model's prefix; empty for an unknown class.

    A model of another class may have a new head, or a pooler, that no file holds.
    """
    names = model.config.architectures or ("",)
    kind = getattr(transformers, names[0], None)
    if kind is None or not isinstance(model.config, kind.config_class):
        return set()
    with torch.device("meta"):
        saved = kind(copy.deepcopy(model.config))
    prefix = f"{saved.base_model_prefix}."
    return {name.removeprefix(prefix) for name in saved.state_dict() if name not in saved.all_tied_weights_keys}
