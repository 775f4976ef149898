"""Puts packed modules in the place of a model's Linears, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lopro_fx.errors import ModelError
from lopro_fx.huggingface.modules import PackedInput, PackedLinear
from lopro_fx.passes.packed import PackedGroup, PackedSite, dense_weight


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The Linear of that name.

    Raises:
        ModelError: there is none, or the module computes something else as well.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no module '{name}': is it the model that was quantised?"
        ) from error
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise ModelError(
            f"'{name}' is a {type(module).__name__}, and only nn.Linear can be replaced in a transformers model: "
            f"quantise with exclude='{name}'"
        )
    return module


def replace_linears(
    model: nn.Module, groups: Iterable[PackedGroup], sites: Mapping[str, PackedSite], activations: str
) -> None:
    """Replace, in place, each Linear that `sites` names; its bias is kept.

    Raises:
        ModelError: a name is not that of a Linear, or its size differs.
    """
    for group in groups:
        shared = PackedInput(group)
        for name in group.members:
            linear, site = linear_of(model, name), sites[name]
            if (have := (linear.out_features, linear.in_features)) != (site.out_features, site.in_features):
                raise ModelError(
                    f"'{name}' is a Linear of {have}, but was quantised as {(site.out_features, site.in_features)}"
                )
            owner = name == group.name
            model.set_submodule(name, PackedLinear(site, shared, owner, linear.bias, activations))


def restore_linears(model: nn.Module, dtype: Any) -> None:
    """Put dense Linears of `dtype` back, in place, with the weights that the packed modules compute with."""
    for name, packed in list(model.named_modules()):
        if not isinstance(packed, PackedLinear):
            continue
        group, site = packed.as_packed(name)
        linear = nn.Linear(site.in_features, site.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dense_weight(group, site).to(dtype), requires_grad=False)
        linear.register_parameter("bias", packed.bias)
        model.set_submodule(name, linear)


def untie(model: Any, sites: Mapping[str, PackedSite]) -> None:
    """Make the configuration say that the output projection has weights of its own, if it is one of `sites`."""
    head = model.get_output_embeddings()
    if any(module is head for name, module in model.named_modules() if name in sites):
        for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
