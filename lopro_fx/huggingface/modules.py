"""What stands in a transformers model for what was quantised. Knows torch and the operators, not transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lopro_fx.kernels.cpu_site.activations import ACTIVATIONS
from lopro_fx.passes.packed import PackedGroup, PackedSite


class Packed(nn.Module):
    """Buffers that keep their dtype when the model is cast, because it is part of the packed format.

    `dtypes` is what they are to be, by name.
    """

    dtypes: dict[str, torch.dtype]

    def _hold(self, tensors: Mapping[str, Tensor], keys: tuple[str, ...]) -> None:
        self.dtypes = {key: tensors[key].dtype for key in keys if key in tensors}
        for key in keys:
            tensor = tensors.get(key)
            self.register_buffer(key, None if tensor is None else _alone(tensor))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keeps = isinstance(tensor, nn.Parameter) or moved.dtype == tensor.dtype
            return moved if keeps else tensor.to(moved.device)

        return super()._apply(move, recurse)


class PackedTable(Packed):
    """Codes, scales and zeros of one weight.

    The codes are called `weight`, because a reader that doesn't know the format then stops at their shape, instead of
    taking the layer for one without weights and filling it with random ones.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor

    def _hold_table(self, site: PackedSite, also: tuple[str, ...] = ()) -> None:
        self.bits, self.group_size = site.bits, site.group_size
        self._hold({**site.tensors, "weight": site.tensors["codes"]}, ("weight", "scales", "zeros", *also))


class PackedEmbedding(PackedTable):
    """Rows of a packed weight, in the dtype of the model: ids (...) int64 to (..., embedding_dim)."""

    def __init__(self, site: PackedSite, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = site.out_features, site.in_features, dtype
        self._hold_table(site)

    def forward(self, ids: Tensor) -> Tensor:
        table = ids, self.weight, self.scales, self.zeros, self.bits, self.group_size
        return torch.ops.lopro.packed_embedding(*table, self.embedding_dim, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"


class PackedInput(Packed):
    """Permutation, signs and down factor that the Linears of a group apply to the tensor that they share.

    It lies in the Linear that the group is named after, under `input`, so that a checkpoint holds it once; the others
    refer to it.
    """

    perm: Tensor | None
    signs: Tensor | None
    down: Tensor | None
    down_scale: Tensor | None

    def __init__(self, group: PackedGroup) -> None:
        super().__init__()
        self.block, self.skip = group.block, group.skip
        self._hold(group.tensors, ("perm", "signs", "down", "down_scale"))

    def extra_repr(self) -> str:
        return f"block={self.block}, skip={self.skip}, rank={0 if self.down is None else self.down.shape[0]}"


class PackedLinear(PackedTable):
    """Linear over packed weights: (..., in_features) to (..., out_features) in the input's dtype.

    Each rotates its input itself, also where several share it.

    Args:
        site: packed tensors and their layout.
        shared: the group's side of it.
        owner: whether this is the Linear whose state holds `shared`.
        bias: (out_features,), or None.
        activations: "int8" to round the rotated input per token on a CPU, or "float". Where gradients are asked for it
            stays as it is.
        table: the embedding that holds the weight, if one does.
    """

    up: Tensor | None
    up_scale: Tensor | None

    def __init__(
        self,
        site: PackedSite,
        shared: PackedInput,
        owner: bool,
        bias: nn.Parameter | None,
        activations: str,
        table: PackedEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = site.in_features, site.out_features
        self.bits, self.group_size = site.bits, site.group_size
        self.act_bits = ACTIVATIONS[activations]
        if table is None:
            self._hold_table(site, ("up", "up_scale"))
        else:
            self._hold({}, ("up", "up_scale"))
        self.bias = bias
        if owner:
            self.input = shared
        # In tuples, where nn.Module doesn't look for modules.
        self._shared = (shared,)
        self._table: tuple[PackedTable, ...] = () if table is None else (table,)

    @property
    def shared(self) -> PackedInput:
        return self._shared[0]

    @property
    def table(self) -> PackedTable:
        """What holds the weight: the module itself, or an embedding."""
        return self._table[0] if self._table else self

    def forward(self, x: Tensor) -> Tensor:
        shared, table = self.shared, self.table
        operands = (x, shared.perm, shared.signs, shared.block, shared.skip, shared.down, shared.down_scale,
                    table.weight, table.scales, table.zeros, self.bias, self.up, self.up_scale, self.bits,
                    self.group_size)  # fmt: skip
        # The CPU's operator has no derivative.
        if x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled()):
            return torch.ops.lopro.cpu_site(*operands, self.act_bits)
        return torch.ops.lopro.packed_site(*operands)

    def as_packed(self, name: str) -> tuple[PackedGroup, PackedSite]:
        """The tensors as passes take them; the group has this site alone."""
        own = {**_buffers(self), **_buffers(self.table)}
        own["codes"] = own.pop("weight")
        shared = self.shared
        group = PackedGroup(name, (name,), self.in_features, shared.block, shared.skip, _buffers(shared))
        sizes = (self.bits, self.group_size, self.out_features, self.in_features)
        return group, PackedSite(name, name, *sizes, own)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, act_bits={self.act_bits}, bias={self.bias is not None}"
        )


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers(recurse=False))


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if it is a part of a larger one: files take storages for tensors."""
    whole = tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
