"""Names of packed tensors in files, where they differ from those in the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, WeightTransform

from lopro_fx.huggingface.modules import PackedModule, PackedWeight

# Under this name, a reader that doesn't know the format stops at the shape; under another, it would fill the layer with
# random weights.
STORED = "weight"


class PackedRenaming(WeightRenaming):
    """Renaming of `weight` in files to the first tensor of a format, for modules of these names; reversible."""

    __slots__ = ("_held", "_to_files")

    def __init__(self, held: Mapping[str, str], to_files: bool = False) -> None:
        super().__init__(*(("packed", STORED) if to_files else (STORED, "packed")))
        self._held, self._to_files = dict(held), to_files

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        owner, _, key = source_key.rpartition(".")
        ends = (STORED, self._held.get(owner))
        before, after = reversed(ends) if self._to_files else ends
        if owner not in self._held or key != before:
            return source_key, None
        self._was_used = True
        return f"{owner}.{after}", key

    def reverse_transform(self) -> PackedRenaming:
        return PackedRenaming(self._held, not self._to_files)


@dataclass(frozen=True)
class PackedNames:
    """First tensor of each module that holds a packed weight (`held`), and names of all packed tensors (`tensors`),
    with and without the base model's prefix."""

    held: dict[str, str]
    tensors: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> PackedNames:
        """Collect them from a model whose modules were replaced."""
        packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
        held = {name: key for name, module in packed.items() if (key := first_tensor(module)) is not None}
        tensors = [f"{name}.{key}" for name, module in packed.items() for key in module.dtypes]
        tensors += [f"{name}.{STORED}" for name in held]
        held = {form: key for name, key in held.items() for form in _in_files(model, [name])}
        return cls(held, _in_files(model, tensors))

    def conversions(self, known: Iterable[Any]) -> list[Any]:
        """Adapt transformers' conversions between files and a model to packed modules.

        Conversions that rename weights, or join and split those of several Linears, skip packed tensors: their names in
        files are those of the model's modules.
        """
        return [*(_sparing(entry, self.tensors) for entry in known), PackedRenaming(self.held)]


def first_tensor(module: PackedModule) -> str | None:
    """Name of the first tensor of the packed weight that a module holds; None if it holds none."""
    key = next(iter(module.layout.tensors)) if isinstance(module, PackedWeight) else None
    return key if key in module.dtypes else None


def _in_files(model: Any, names: Iterable[str]) -> frozenset[str]:
    """Names with and without the prefix of the base model, since files may hold either."""
    prefix = f"{model.base_model_prefix}."
    return frozenset(form for name in names for form in (name, prefix + name, name.removeprefix(prefix)))


def _sparing(entry: WeightTransform, keys: Collection[str]) -> WeightTransform:
    """Exempt these keys from a conversion, and from whatever transformers makes of it."""
    kind: Any = type(entry)

    def rename_source_key(self: Any, source_key: str) -> tuple[str, str | None]:
        return (source_key, None) if source_key in keys else kind.rename_source_key(self, source_key)

    def reduced(self: Any) -> Any:
        plain = kind.__new__(kind)
        _copy_slots(self, plain)
        return _sparing, (plain, keys)

    made = {"__slots__": (), "rename_source_key": rename_source_key, "__reduce__": reduced}
    # transformers copies through the class, whose slots have no room for attributes of ours.
    subclass: Any = type(kind.__name__, (kind,), made)
    spared = subclass.__new__(subclass)
    _copy_slots(entry, spared)
    return spared


def _copy_slots(source: Any, target: Any) -> None:
    for name in {name for kind in type(source).__mro__ for name in getattr(kind, "__slots__", ())}:
        if hasattr(source, name):
            object.__setattr__(target, name, getattr(source, name))
    for name, value in getattr(source, "__dict__", {}).items():
        object.__setattr__(target, name, value)


def rename_on_saving(model: Any) -> None:
    """Make `save_pretrained` write the tensors' names in files, for a model that wasn't loaded with them."""
    known = getattr(model, "_weight_conversions", None)
    if known is None:
        # As transformers does for a model that it didn't load.
        known = [entry for entry in get_model_conversion_mapping(model, add_legacy=False)
                 if not isinstance(entry, PrefixChange)]  # fmt: skip
    model._weight_conversions = PackedNames.of(model).conversions(known)
