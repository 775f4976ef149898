"""Quantised weights that a transformers model holds dense, because no packed module can replace theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lopro_fx.errors import ModelError
from lopro_fx.huggingface.experts import experts_weight
from lopro_fx.huggingface.linears import as_linear
from lopro_fx.huggingface.replace import has_module
from lopro_fx.layer import Input, Layer, dense_weight
from lopro_fx.state import QuantState


def without_others(model: nn.Module, state: QuantState) -> tuple[QuantState, dict[str, Tensor]]:
    """Remove the layers from a state that no packed module can replace.

    Returns:
        The state with Linears and experts alone, and the dense weights of the others, as the model stores them, by FQN.

    Raises:
        ModelError: the model has no such weight, or can't replace it because it is offloaded.
    """
    others = [name for name in state.layers if not _is_linear(model, name) and experts_weight(model, name) is None]
    if not others:
        return state, {}
    inputs: dict[str, Input] = {}
    layers: dict[str, Layer] = {}
    for shared in state.inputs.values():
        readers = tuple(name for name in shared.readers if name not in others)
        if readers:
            inputs[readers[0]] = replace(shared, name=readers[0], readers=readers)
            layers |= {name: replace(state.layers[name], input=readers[0]) for name in readers}
    reason = "quantised and stored dense: transformers has no Linear or experts of that name to pack"
    skipped = [*state.skipped, *((name, reason) for name in others)]
    dense = dict(_dense(model, state, name) for name in others)
    return replace(state, inputs=inputs, layers=layers, skipped=skipped), dense


def beside_packed(model: nn.Module, state: QuantState, embeddings: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Make dense weights, by FQN, for tensors that are tied to a packed one but whose module can't read it packed.

    An output projection that was solved on its own is no longer tied: embeddings keep their weight then.

    Args:
        model: whose tensors are tied.
        state: from `without_others`.
        embeddings: names of the embeddings that read a layer's weight packed, by the layer's name.
    """
    tensors, found = _tensors(model), {}
    for name, layer in state.layers.items():
        if layer.experts:
            continue
        readers = {f"{reader}.weight" for reader in (name, *embeddings.get(name, ()))}
        weight = tensors[f"{name}.weight"]
        others = [fqn for fqn, tensor in tensors.items() if tensor is weight and fqn not in readers]
        others = [fqn for fqn in others if fqn.removesuffix(".weight") not in state.layers]
        if not layer.embedding:
            others = [fqn for fqn in others if _is_linear(model, fqn.removesuffix(".weight"))]
        if others:
            found |= dict.fromkeys(others, _as_stored(dense_weight(state.inputs[layer.input], layer), weight))
    return found


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace weights by FQN, in place, under every name that they have."""
    tensors = _tensors(model)
    for fqn, weight in weights.items():
        old = tensors[fqn]
        new = nn.Parameter(weight, requires_grad=False) if isinstance(old, nn.Parameter) else weight
        for name in (name for name, tensor in tensors.items() if tensor is old):
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, new)


def _is_linear(model: nn.Module, name: str) -> bool:
    return has_module(model, name) and as_linear(model.get_submodule(name)) is not None


def _dense(model: nn.Module, state: QuantState, name: str) -> tuple[str, Tensor]:
    tensors, layer = _tensors(model), state.layers[name]
    fqn = next((fqn for fqn in (f"{name}.weight", name) if fqn in tensors), None)
    if fqn is None:
        raise ModelError(f"{type(model).__name__} has no weight of '{name}', which was quantised")
    old = tensors[fqn]
    if old.is_meta:
        raise ModelError(
            f"'{fqn}' is offloaded, and stored dense, since it is no Linear's: load the model on one device, or "
            f"quantise with exclude='{name}'"
        )
    dense = dense_weight(state.inputs[layer.input], layer)
    if old.shape not in (dense.shape, dense.mT.shape):
        raise ModelError(f"the weight of '{name}' is {tuple(old.shape)}, but was quantised as {tuple(dense.shape)}")
    return fqn, _as_stored(dense, old)


def _as_stored(dense: Tensor, old: Tensor) -> Tensor:
    """Return the weight, or its transpose, as `old` stores it; of a square one, the nearer to `old`."""
    dense = dense.to(old.device, old.dtype)
    forms = [form for form in (dense, dense.mT) if form.shape == old.shape]
    return min(forms, key=lambda form: (form - old).norm().item()).contiguous()


def _tensors(model: nn.Module) -> dict[str, Any]:
    return dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
