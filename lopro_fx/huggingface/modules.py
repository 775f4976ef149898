"""Packed modules that replace quantised ones in a transformers model: what they share, and embeddings.

Knows torch and the operators only, as `products` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lopro_fx.errors import ModelError
from lopro_fx.kernels.formats.base import Packed, Scalar
from lopro_fx.kernels.formats.registry import dequantize, known_format, operator_of
from lopro_fx.layer import Layer


class PackedModule(nn.Module):
    """Module whose buffers keep their dtype when the model is cast, because it is part of the packed format.

    `dtypes` holds their dtypes by name. Other modules get the buffers from `forward`, never as attributes: offloading
    wraps `forward` to bring them to the device.
    """

    dtypes: dict[str, torch.dtype]

    def _hold(self, tensors: Mapping[str, Tensor], keys: tuple[str, ...]) -> None:
        self.dtypes = {key: tensors[key].dtype for key in keys if key in tensors}
        for key in keys:
            tensor = tensors.get(key)
            self.register_buffer(key, None if tensor is None else _alone(tensor))

    def held(self, keys: tuple[str, ...]) -> tuple[Tensor | None, ...]:
        """Return the buffers of these names, None for a missing one."""
        return tuple(getattr(self, key) for key in keys)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        fixed = {id(self._buffers[key]) for key in self.dtypes}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in fixed and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)


class PackedWeight(PackedModule):
    """Packed module whose `weight` reads like that of the module it replaces; `dtype` is that of the model.

    The tensors of its weight are its own, or those of an embedding that shares the weight.
    """

    dtype: torch.dtype
    # The weight without its values.
    layout: Packed
    # A tuple of at most one, where nn.Module doesn't look for modules.
    _table: tuple[PackedEmbedding, ...]

    @property
    def table(self) -> PackedWeight:
        """Module that holds the weight: this one, or an embedding."""
        return self._table[0] if self._table else self

    def table_tensors(self) -> tuple[Any, ...]:
        """Tensors of the weight, in the format's order."""
        # `forward`, because accelerate wraps it; a call of the embedding would run the hooks of a lookup.
        return self._table[0].forward() if self._table else self.held(tuple(self.layout.tensors))

    def packed(self) -> Packed:
        """Return the packed weight."""
        return replace(self.layout, tensors=dict(zip(self.layout.tensors, self.table_tensors(), strict=True)))

    def operator(self, kind: str) -> Any:
        """Return the format's operator of this kind; None if it has none."""
        return operator_of(self.layout.format, kind)

    @property
    def numbers(self) -> tuple[Scalar, ...]:
        """The format's scalars, as its operators take them."""
        return tuple(self.layout.spec[key] for key in known_format(self.layout.format).spec)

    def describe(self) -> str:
        """Format and its scalars, for `extra_repr`."""
        return ", ".join(f"{key}={value}" for key, value in {"format": self.layout.format, **self.layout.spec}.items())

    @property
    def weight(self) -> Tensor:
        # Tracers can't follow `DenseWeight`. Where only the dtype is read, the unpacking falls out of the graph.
        return self.dense() if torch.compiler.is_compiling() else DenseWeight(self)

    def dense(self) -> Tensor:
        """Return the weight (out_features, in_features) that the module computes with, in `dtype`."""
        raise NotImplementedError

    def place(self) -> tuple[tuple[int, ...], torch.device]:
        """Shape and device of the weight."""
        return self.layout.shape, getattr(self.table, next(iter(self.layout.tensors))).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)


class DenseWeight(Tensor):
    """Stand-in for a packed module's `weight`: shape, dtype and device cost nothing, and an operator that takes it gets
    the unpacked weight.

    Raises:
        ModelError: an operator would write it.
    """

    _module: PackedWeight
    # Without this, transformers would initialise it.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, module: PackedWeight) -> DenseWeight:
        shape, device = module.place()
        made: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=module.dtype, device=device)
        made._module = module
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            raise _packed_is_fixed()
        args, kwargs = tree_map_only(cls, lambda weight: weight._module.dense(), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    # Neither of the two reaches an operator that takes this tensor: what they write would be lost.
    def __setitem__(self, *_: Any) -> None:
        raise _packed_is_fixed()

    @property
    def data(self) -> DenseWeight:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self

    @data.setter
    def data(self, _: Any) -> None:
        raise _packed_is_fixed()

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"DenseWeight({tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


class PackedEmbedding(PackedWeight, nn.Embedding):
    """Rows of a packed weight, in the dtype of the model: ids (...) int64 to (..., embedding_dim).

    Called without ids, it gives the tensors of its weight. Made by `packed_embedding`.
    """

    def forward(self, ids: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        table = self.table_tensors()
        if ids is None:
            return table
        return self.operator("embedding")(ids, *table, *self.numbers, self.embedding_dim, self.dtype)

    def dense(self) -> Tensor:
        return dequantize(self.packed(), self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.describe()}"


def packed_embedding(layer: Layer, plain: nn.Embedding, table: PackedEmbedding | None = None) -> PackedEmbedding:
    """Make the packed replacement of an embedding, with all that its class computes around the lookup.

    `table` is another embedding that holds the weight, if any.
    """
    made = _rebuilt(type(plain))
    made.__dict__.update(_state(plain))
    del made._parameters["weight"]
    made.layout, made.dtype = layout_of(layer), plain.weight.dtype
    made._table = () if table is None else (table,)
    made._hold(layer.tensors, () if table else tuple(layer.weight.tensors))
    return made


def plain_embedding(packed: PackedEmbedding, weight: nn.Parameter) -> nn.Embedding:
    """Inverse of `packed_embedding`, with this weight."""
    kind: Any = nn.Embedding if type(packed) is PackedEmbedding else type(packed).__mro__[1]
    made: nn.Embedding = kind.__new__(kind)
    made.__dict__.update(_state(packed))
    for key in packed.dtypes:
        del made._buffers[key]
    for attribute in ("layout", "dtype", "dtypes", "_table"):
        delattr(made, attribute)
    made.weight = weight
    return made


def _state(module: nn.Module) -> dict[str, Any]:
    """Copy a module's attributes, with copies of collections."""
    return {key: value.copy() if isinstance(value, (dict, set)) else value for key, value in vars(module).items()}


def _rebuilt(kind: type[nn.Embedding]) -> PackedEmbedding:
    made_as = PackedEmbedding if kind is nn.Embedding else _around(kind)
    return made_as.__new__(made_as)


@cache
def _around(kind: type[nn.Embedding]) -> type[PackedEmbedding]:
    """Make a subclass of `kind` whose `super().forward(ids)` looks rows up in the packed weight."""

    def forward(self: PackedEmbedding, *args: Any, **kwargs: Any) -> Any:
        own: Any = kind if args or kwargs else PackedEmbedding
        return own.forward(self, *args, **kwargs)

    def reduced(self: PackedEmbedding) -> Any:
        return _rebuilt, (kind,), self.__dict__

    bases: tuple[Any, ...] = (kind, PackedEmbedding)
    return type(f"Packed{kind.__name__}", bases, {"forward": forward, "__reduce__": reduced})


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module of that name, if there is one."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def layout_of(layer: Layer) -> Packed:
    """Return a layer's weight without its values."""
    return layer.weight.map(lambda tensor: tensor.to("meta"))


def _packed_is_fixed() -> ModelError:
    return ModelError("a packed weight can't be written: dequantize() the model first")


def _alone(tensor: Tensor) -> Tensor:
    """Copy a tensor that is a part of a larger storage, because files identify tensors by their storage."""
    whole = tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
