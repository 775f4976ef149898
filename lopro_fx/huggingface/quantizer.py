"""Quantizer that loads a folder written by lopro_fx into transformers; `lopro_fx.huggingface` registers it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lopro_fx.__about__ import __version__
from lopro_fx.errors import CheckpointError, ConfigError, ModelError
from lopro_fx.huggingface import layout
from lopro_fx.huggingface.experts import experts_weight
from lopro_fx.huggingface.integrity import (
    refuse_missing,
    require_layout,
    require_values,
    stored_tensors,
)
from lopro_fx.huggingface.listing import require_listed
from lopro_fx.huggingface.modules import PackedModule, PackedWeight
from lopro_fx.huggingface.renaming import PackedNames, rename_on_saving
from lopro_fx.huggingface.replace import (
    embedding_of,
    has_module,
    linear_of,
    replace_modules,
    restore_modules,
    set_tied,
    untie,
)
from lopro_fx.huggingface.versions import require_transformers
from lopro_fx.kernels.activation.delivery import ACTIVATIONS, DEFAULT
from lopro_fx.store.reading import interpreting

METHOD = "lopro_fx"
FORMAT = 2
_READ = (1, FORMAT)


class LoProConfig(QuantizationConfigMixin):
    """`quantization_config` of a model that lopro_fx quantised.

    To choose how a saved model computes, pass `from_pretrained(..., quantization_config=LoProConfig(activations=...))`,
    and `verify=True` to have its files verified; the rest is read from the folder.

    Args:
        activations: "int8" to round each token's rotated activations inside the CPU kernel, or "float" to keep them; a
            GPU rounds none. None is what the folder says, or the default.
        verify: whether to compare the SHA-256 of the safetensors files with those in `lopro_fx_report.json`. That reads
            all of them: 0.6 s a GB, where loading without it takes 0.2 s. Never saved.
        method: the method and its parameters, as `Method.to_dict` gives them.
        inputs, layers: see `lopro_fx/huggingface/layout.py`.
        groups, sites: the same in format 1.
        lopro_fx: version that wrote the folder.
        format: version of this layout.

    Raises:
        ConfigError: `activations` is none of the two.
        CheckpointError: another format.
    """

    def __init__(
        self,
        activations: str | None = None,
        *,
        verify: bool = False,
        method: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        layers: dict[str, Any] | None = None,
        groups: dict[str, Any] | None = None,
        sites: dict[str, Any] | None = None,
        lopro_fx: str = __version__,
        format: int = FORMAT,
        quant_method: str = METHOD,
    ) -> None:
        if format not in _READ:
            raise CheckpointError(
                f"the model has format version {format}, but lopro_fx {__version__} reads version "
                f"{' and '.join(map(str, _READ))}: use the lopro_fx that wrote it ({lopro_fx})"
            )
        # Of a file, they may be of any type.
        if activations is not None and activations not in tuple(ACTIVATIONS):
            raise ConfigError(f"LoProConfig(activations={activations!r}): allowed are {', '.join(ACTIVATIONS)}")
        self.quant_method: Any = quant_method
        self.activations, self.method = activations or DEFAULT, method
        self.inputs, self.layers = inputs or {}, layers or {}
        if format == 1:
            self.groups, self.sites = groups or {}, sites or {}
        self.lopro_fx, self.format = lopro_fx, format
        self.verify, self._chosen = verify, activations

    def get_loading_attributes(self) -> dict[str, Any]:
        """Attributes that an argument of `from_pretrained` overrides in a saved configuration."""
        chosen = {} if self._chosen is None else {"activations": self._chosen}
        return {"verify": self.verify, **chosen}

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key not in ("verify", "_chosen")}


class LoProHfQuantizer(HfQuantizer):
    """Quantizer that puts packed modules into a model before it is read, and refuses a folder that lacks a tensor."""

    requires_calibration = True
    quantization_config: LoProConfig
    _names: PackedNames

    def validate_environment(self, *_: Any, **__: Any) -> None:
        require_transformers("loading a model that lopro_fx quantised")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        files = checkpoint_files or ()
        stored = stored_tensors(files)
        config, place = self.quantization_config, _Place(model)
        with interpreting("the quantization_config"):
            if config.format == 1:
                _upgrade(config, place)
            layers = {place(name): {**entry, "input": place(entry["input"])}
                      for name, entry in config.layers.items() if place.has(name, entry["embedding"])}  # fmt: skip
            embeddings = {name: [place(reader) for reader in (entry["embedding"], *entry["readers"])]
                          for name, entry in layers.items() if entry["embedding"]}  # fmt: skip
            shared, made = layout.restore({place(name): entry for name, entry in config.inputs.items()}, layers)
            if embeddings:
                # Folders of lopro_fx 0.1.0 say that nothing is tied, which is false of weights that aren't packed.
                set_tied(model, True)
            untie(model, {*made, *chain(*embeddings.values())})
            replace_modules(model, shared, made, embeddings, config.activations)
        _refuse_resizing(model)
        require_layout(model, stored)
        if config.verify:
            require_listed(files)
        self._names = PackedNames.of(model)
        refuse_missing(model, self._names, files)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        return self._names.conversions(super().update_weight_conversions(weight_conversions, *model))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, PackedModule):
                require_values(name, module)
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        # The configuration's dtype won't do: it is that of loading, and a string once the model was saved.
        restore_modules(model, dtype)
        model.__dict__.pop("resize_token_embeddings", None)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed Linears, and their biases, train; packed weights don't."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any, config: LoProConfig) -> None:
    """Make transformers treat a model with replaced Linears as one that it loaded with `config`."""
    model.hf_quantizer = LoProHfQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.config.quantization_config = config
    rename_on_saving(model)
    _refuse_resizing(model)


def _refuse_resizing(model: Any) -> None:
    """Make the model refuse to resize a packed embedding or output projection, before it changes either."""
    ends = []
    for end in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):
            ends.append(end())
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and any(module is end for end in ends):
            model.resize_token_embeddings = partial(_resize_token_embeddings, name)
            return


def _resize_token_embeddings(name: str, *_: Any, **__: Any) -> None:
    raise ModelError(f"'{name}' is packed and can't be resized: resize the model before quantising, or dequantize() it")


class _Place:
    """Map saved names to names in `model`, which may be the saved model or the base model inside it."""

    def __init__(self, model: Any) -> None:
        self._model, self._prefix = model, f"{model.base_model_prefix}."
        self._is_base = model.base_model is model

    def __call__(self, name: str) -> str:
        return name.removeprefix(self._prefix) if self._is_base else name

    def size(self, name: str, embedding: str | None) -> tuple[int, int]:
        """(out_features, in_features) of a Linear's weight, or of the embedding that holds it."""
        if embedding is not None:
            table = embedding_of(self._model, self(embedding))
            return table.num_embeddings, table.embedding_dim
        linear = linear_of(self._model, self(name))
        return linear.out_features, linear.in_features

    def has(self, name: str, embedding: str | None) -> bool:
        """Whether there is something to replace: a base model lacks the lm_head, which is no error."""
        owners = [self(owner) for owner in (name, embedding) if owner is not None]
        found = any(has_module(self._model, owner) or experts_weight(self._model, owner) for owner in owners)
        if not found and (name.startswith(self._prefix) or not self._is_base):
            raise ModelError(f"{type(self._model).__name__} has no module '{name}', which was quantised")
        return found


def _upgrade(config: LoProConfig, place: _Place) -> None:
    """Convert a configuration of format 1 to the current one, taking the sizes of tensors from the model."""
    sites = {name: entry for name, entry in config.sites.items() if place.has(name, entry["embedding"])}
    config.inputs, config.layers = layout.from_version_1(
        config.groups, sites, lambda name: place.size(name, sites[name]["embedding"])
    )
    del config.groups, config.sites
    config.format = FORMAT


def register() -> None:
    """Register the configuration and the quantizer with transformers."""
    auto.register_quantization_config(METHOD)(LoProConfig)
    auto.register_quantizer(METHOD)(LoProHfQuantizer)
    # The one place that says which attributes of a saved configuration an argument may override.
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, LoProConfig)
