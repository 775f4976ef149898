"""Puts packed modules in the place of a model's Linears and tied embeddings, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lopro_fx.errors import ModelError
from lopro_fx.huggingface.modules import PackedEmbedding, PackedInput, PackedLinear
from lopro_fx.passes.packed import PackedGroup, PackedSite, dense_weight


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The Linear of that name.

    Raises:
        ModelError: there is none, or the module computes something else as well.
    """
    return _plain(model, name, nn.Linear, f"exclude='{name}'")


def embedding_of(model: nn.Module, name: str) -> nn.Embedding:
    """The embedding of that name; errors as in `linear_of`."""
    return _plain(model, name, nn.Embedding, "head_bits=0")


def tied_embeddings(model: nn.Module, sites: Mapping[str, PackedSite]) -> dict[str, str]:
    """Name of the embedding that is to read the packed weight of a site, for those sites that have one.

    Raises:
        ModelError: a site is no Linear of the model.
    """
    tables = {module.weight: name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    weights = {name: linear_of(model, name).weight for name, site in sites.items() if site.embedding}
    return {name: tables[weight] for name, weight in weights.items() if weight in tables}


def replace_modules(
    model: nn.Module,
    groups: Iterable[PackedGroup],
    sites: Mapping[str, PackedSite],
    embeddings: Mapping[str, str],
    activations: str,
) -> None:
    """Replace, in place, each Linear that `sites` names, keeping its bias, and each embedding of `embeddings`.

    A Linear with an embedding may be absent: the base model of a causal language model has no output projection.

    Raises:
        ModelError: a name is not that of a Linear or an embedding, or its size differs.
    """
    for group in groups:
        shared = PackedInput(group)
        for name in group.members:
            site, table = sites[name], None
            if name in embeddings:
                embedding = embedding_of(model, embeddings[name])
                table = PackedEmbedding(site, embedding.weight.dtype)
                model.set_submodule(embeddings[name], table)
                if not has_module(model, name):
                    continue
            linear = linear_of(model, name)
            if (have := (linear.out_features, linear.in_features)) != (site.out_features, site.in_features):
                raise ModelError(
                    f"'{name}' is a Linear of {have}, but was quantised as {(site.out_features, site.in_features)}"
                )
            packed = PackedLinear(site, shared, name == group.name, linear.bias, activations, table)
            model.set_submodule(name, packed)


def restore_modules(model: Any, dtype: torch.dtype) -> None:
    """Put Linears and embeddings of `dtype` back, in place, with the weights that the packed modules compute with."""
    tables: dict[int, nn.Parameter] = {}
    for name, packed in list(model.named_modules()):
        if isinstance(packed, PackedLinear):
            weight = nn.Parameter(dense_weight(*packed.as_packed(name)).to(dtype), requires_grad=False)
            tables[id(packed.table)] = weight
            linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
            linear.weight = weight
            linear.register_parameter("bias", packed.bias)
            model.set_submodule(name, linear)
    for name, packed in list(model.named_modules()):
        if isinstance(packed, PackedEmbedding):
            embedding = nn.Embedding(packed.num_embeddings, packed.embedding_dim, device="meta")
            embedding.weight = tables[id(packed)]
            model.set_submodule(name, embedding)
            _set_tie(model, True)


def untie(model: Any, sites: Mapping[str, PackedSite]) -> None:
    """Make the configuration say that the output projection is not tied, if it is one of `sites`: packed modules take
    care of what they share themselves."""
    head = model.get_output_embeddings()
    if any(module is head for name, module in model.named_modules() if name in sites):
        _set_tie(model, False)
        model.all_tied_weights_keys = {}


def has_module(model: nn.Module, name: str) -> bool:
    """Whether the model has a module of that name."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _set_tie(model: Any, tied: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied


def _plain(model: nn.Module, name: str, kind: Any, way_out: str) -> Any:
    if not has_module(model, name):
        raise ModelError(f"{type(model).__name__} has no module '{name}', which was quantised")
    module = model.get_submodule(name)
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        raise ModelError(
            f"'{name}' is a {type(module).__name__}, and only nn.{kind.__name__} can be replaced in a transformers "
            f"model: quantise with {way_out}"
        )
    return module
