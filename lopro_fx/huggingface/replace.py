"""Replace a model's Linears, experts and tied embeddings by packed modules, and restore them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lopro_fx.errors import ModelError
from lopro_fx.huggingface.experts import experts_weight, restore_experts
from lopro_fx.huggingface.linears import as_linear, restored, stand_in
from lopro_fx.huggingface.modules import PackedEmbedding, find_module, packed_embedding, plain_embedding
from lopro_fx.huggingface.products import PackedExperts, PackedInput, PackedLinear
from lopro_fx.layer import Input, Layer


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """Return the Linear called `name`.

    Raises:
        ModelError: there is none, or the module computes something else as well.
    """
    module = _module(model, name)
    linear = as_linear(module)
    if linear is None:
        raise ModelError(
            f"'{name}' is a {type(module).__name__}, and only Linears can be replaced in a transformers model: "
            f"quantise with exclude='{name}'"
        )
    return linear


def embedding_of(model: nn.Module, name: str) -> nn.Embedding:
    """Return the embedding called `name`; its class may compute something around the lookup.

    Raises:
        ModelError: there is none, or looking rows up changes it.
    """
    embedding = _module(model, name)
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        what = "has a max_norm" if isinstance(embedding, nn.Embedding) else f"is a {type(embedding).__name__}"
        raise ModelError(f"'{name}' {what}, and can't read a packed weight: quantise with head_bits=0")
    return embedding


def tied_embeddings(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, list[str]]:
    """Map each layer with tied embeddings to the names of those, which will read its packed weight.

    Raises:
        ModelError: a layer is no Linear of the model.
    """
    tables: dict[Tensor, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            tables.setdefault(module.weight, []).append(name)
    weights = {name: linear_of(model, name).weight for name, layer in layers.items() if layer.embedding}
    return {name: tables[weight] for name, weight in weights.items() if weight in tables}


def replace_modules(
    model: nn.Module,
    inputs: Mapping[str, Input],
    layers: Mapping[str, Layer],
    embeddings: Mapping[str, Sequence[str]],
    activations: str,
) -> None:
    """Replace, in place, each Linear that `layers` names, keeping its bias, each parameter of experts, and each
    embedding of `embeddings`.

    The first of a layer's embeddings holds the weight. A Linear with an embedding may be absent: the base model of a
    causal language model has no output projection.

    Raises:
        ModelError: a name is not that of a Linear, experts or an embedding, or its size differs.
    """
    for first, shared in inputs.items():
        module = PackedInput(shared)
        for name in shared.readers:
            layer, table = layers[name], None
            experts = experts_weight(model, name) if layer.experts else None
            if experts is not None:
                _require_size(name, experts.shape, layer)
                plain, transposed = experts.parameter, experts.owner.is_transposed
                experts.replace(PackedExperts(layer, module, name == first, plain, transposed, activations))
                continue
            for reader in embeddings.get(name, ()):
                embedding = embedding_of(model, reader)
                _require_size(reader, (embedding.num_embeddings, embedding.embedding_dim), layer)
                packed = packed_embedding(layer, embedding, table)
                model.set_submodule(reader, packed)
                table = table or packed
            if table and not has_module(model, name):
                continue
            linear = linear_of(model, name)
            _require_size(name, (linear.out_features, linear.in_features), layer)
            packed = PackedLinear(layer, module, name == first, linear, activations, table)
            model.set_submodule(name, stand_in(packed, model.get_submodule(name)))


def restore_modules(model: Any, dtype: torch.dtype | None) -> None:
    """Restore Linears, experts and embeddings, in place, with the weights that the packed modules compute with.

    The whole model is cast to `dtype`; None casts nothing.
    """
    restore_experts(model)
    tables: dict[int, nn.Parameter] = {}
    for name, packed in list(model.named_modules()):
        if isinstance(packed, PackedLinear):
            weight = nn.Parameter(packed.dense(), requires_grad=False)
            tables[id(packed.table)] = weight
            linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
            linear.weight = weight
            linear.register_parameter("bias", packed.bias)
            model.set_submodule(name, restored(packed, linear))
    for name, packed in list(model.named_modules()):
        if isinstance(packed, PackedEmbedding):
            # A base model has no output projection.
            weight = tables.get(id(packed.table))
            if weight is None:
                weight = tables[id(packed.table)] = nn.Parameter(packed.dense(), requires_grad=False)
            model.set_submodule(name, plain_embedding(packed, weight))
    _tie_again(model)
    if dtype is not None:
        model.to(dtype)


def untie(model: Any, packed: Collection[str]) -> None:
    """Make transformers leave the weights of these modules untied, since packed modules share weights themselves.

    The model's other ties, such as the two names of an output projection's bias, stay. Call it before modules are
    replaced.
    """
    weights = {f"{name}.weight" for name in packed}
    for prefix, part in _tying(model):
        tied = part.get_expanded_tied_weights_keys(all_submodels=False)
        kept = {target: source for target, source in tied.items()
                if weights.isdisjoint((prefix + target, prefix + source))}  # fmt: skip
        if kept != tied:
            part._tied_weights_keys = kept
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def set_tied(model: Any, tied: bool) -> None:
    """Set whether the configuration ties the output projection."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied


def _tie_again(model: Any) -> None:
    """Undo `untie`: the configuration and the class say what is tied, as in files of a plain model."""
    for _, part in _tying(model):
        part.__dict__.pop("_tied_weights_keys", None)
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    pairs = [(target, *(model.get_parameter_or_buffer(name) for name in (target, source)))
             for target, source in tied.items()]  # fmt: skip
    if all(first is second for _, first, second in pairs):
        model.all_tied_weights_keys = tied
        return
    # A projection that was solved on its own differs from the embedding: nothing is tied then.
    for target, first, second in pairs:
        if first is second:
            owner, _, key = target.rpartition(".")
            setattr(model.get_submodule(owner), key, nn.Parameter(first.detach().clone(), first.requires_grad))
    set_tied(model, False)
    model.all_tied_weights_keys = {}


def _tying(model: Any) -> list[tuple[str, Any]]:
    """(prefix of names, model) of the model and every model inside it."""
    return [(f"{name}." if name else "", part) for name, part in model.named_modules()
            if hasattr(part, "get_expanded_tied_weights_keys")]  # fmt: skip


def has_module(model: nn.Module, name: str) -> bool:
    """Whether the model has a module of that name."""
    return find_module(model, name) is not None


def _module(model: nn.Module, name: str) -> nn.Module:
    found = find_module(model, name)
    if found is None:
        raise ModelError(f"{type(model).__name__} has no module '{name}', which was quantised")
    return found


def _require_size(name: str, have: tuple[int, ...], layer: Layer) -> None:
    if have != (want := tuple(layer.weight.shape)):
        raise ModelError(f"the weight of '{name}' is {have}, but was quantised as {want}")
