"""Names of packed tensors in files, where they differ from those in the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, WeightTransform

from lopro_fx.huggingface.modules import PackedModule, PackedWeight
from lopro_fx.huggingface.products import PackedExperts


class PackedRenaming(WeightRenaming):
    """Renaming of tensors by their whole names; reversible."""

    __slots__ = ("_names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__("stored", "packed")
        self._names = dict(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key not in self._names:
            return source_key, None
        self._was_used = True
        return self._names[source_key], source_key

    def reverse_transform(self) -> PackedRenaming:
        return PackedRenaming({after: before for before, after in self._names.items()})


@dataclass(frozen=True)
class PackedNames:
    """Names of tensors that files call otherwise than the model (`renamed`, by the name in files), and names of all
    packed tensors (`tensors`), both with and without the base model's prefix."""

    renamed: dict[str, str]
    tensors: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> PackedNames:
        """Collect them from a model whose modules were replaced."""
        names = {}
        for name, module in model.named_modules():
            if isinstance(module, PackedModule):
                names |= {stored: f"{name}.{key}" for key, stored in names_in_files(name, module).items()}
        renamed = {}
        for stored, name in names.items():
            if stored != name:
                renamed |= zip(forms(model, stored), forms(model, name), strict=True)
        tensors = (form for name in (*names, *names.values()) for form in forms(model, name))
        return cls(renamed, frozenset(tensors))

    def conversions(self, known: Iterable[Any]) -> list[Any]:
        """Adapt transformers' conversions between files and a model to packed modules.

        Conversions that rename weights, or join and split those of several Linears, skip packed tensors: their names in
        files are those of the model's modules.
        """
        return [*(_sparing(entry, self.tensors) for entry in known), PackedRenaming(self.renamed)]


def names_in_files(name: str, module: PackedModule) -> dict[str, str]:
    """Whole names in files of the tensors of a module called `name`, by their names in the module.

    The first tensor of a format has the name of the plain weight: a reader that doesn't know the format stops at its
    shape. Under another name, it would fill the layer with random weights.
    """
    names = {key: f"{name}.{key}" for key in module.dtypes}
    first = next(iter(module.layout.tensors)) if isinstance(module, PackedWeight) else None
    if first in names:
        names[first] = name if isinstance(module, PackedExperts) else f"{name}.weight"
    return names


def forms(model: Any, name: str) -> tuple[str, str, str]:
    """A name with and without the prefix of the base model, since files may hold either."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


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
