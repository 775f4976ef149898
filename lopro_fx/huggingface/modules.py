"""What stands in a transformers model for each quantised Linear. Knows torch and the operators, not transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lopro_fx.passes.packed import PackedGroup, PackedSite

# By the name in a config: width of the activation's codes in `lopro::cpu_site`; 0 keeps it as it is.
ACTIVATIONS = {"float": 0, "int8": 8}


class _Packed(nn.Module):
    """Buffers that keep their dtype when the model is cast, because it is part of the packed format."""

    def _buffers_from(self, tensors: dict[str, Tensor], keys: tuple[str, ...]) -> None:
        self.dtypes = {key: tensors[key].dtype for key in keys if key in tensors}
        for key in keys:
            self.register_buffer(key, tensors.get(key))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keeps = isinstance(tensor, nn.Parameter) or moved.dtype == tensor.dtype
            return moved if keeps else tensor.to(moved.device)

        return super()._apply(move, recurse)


class PackedInput(_Packed):
    """Permutation, signs and down factor that the Linears of a group apply to the tensor that they share.

    It lies in the first of them under `input`, so that a checkpoint holds it once; the others refer to it.
    """

    perm: Tensor | None
    signs: Tensor | None
    down: Tensor | None
    down_scale: Tensor | None

    def __init__(self, group: PackedGroup) -> None:
        super().__init__()
        self.block, self.skip = group.block, group.skip
        self._buffers_from(group.tensors, ("perm", "signs", "down", "down_scale"))

    def extra_repr(self) -> str:
        return f"block={self.block}, skip={self.skip}, rank={0 if self.down is None else self.down.shape[0]}"


class PackedLinear(_Packed):
    """Linear over packed weights: (..., in_features) to (..., out_features) in the input's dtype.

    `weight` holds the codes. Each Linear rotates its input itself, also where several share it.

    Args:
        site: packed tensors and their layout.
        shared: the group's side of it.
        owner: whether this is the Linear whose state holds `shared`.
        bias: (out_features,), or None.
        activations: "float", or "int8" to round the rotated input per token on a CPU.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    up: Tensor | None
    up_scale: Tensor | None

    def __init__(
        self, site: PackedSite, shared: PackedInput, owner: bool, bias: nn.Parameter | None, activations: str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = site.in_features, site.out_features
        self.bits, self.group_size = site.bits, site.group_size
        self.act_bits = ACTIVATIONS[activations]
        # `weight`, because a reader that doesn't know the format then stops at its shape, instead of taking the layer
        # for one without weights and filling it with random ones.
        self._buffers_from({**site.tensors, "weight": site.tensors["codes"]},
                           ("weight", "scales", "zeros", "up", "up_scale"))  # fmt: skip
        self.bias = bias
        if owner:
            self.input = shared
        # In a tuple, where nn.Module doesn't look for modules.
        self._shared = (shared,)

    def forward(self, x: Tensor) -> Tensor:
        shared = self._shared[0]
        operands = (x, shared.perm, shared.signs, shared.block, shared.skip, shared.down, shared.down_scale,
                    self.weight, self.scales, self.zeros, self.bias, self.up, self.up_scale, self.bits,
                    self.group_size)  # fmt: skip
        return torch.ops.lopro.packed_site(*operands)

    def as_packed(self, name: str) -> tuple[PackedGroup, PackedSite]:
        """The tensors as passes take them; the group has this site alone."""
        shared = self._shared[0]
        inputs = dict(shared.named_buffers(recurse=False))
        own = dict(self.named_buffers(recurse=False))
        own["codes"] = own.pop("weight")
        group = PackedGroup(name, (name,), self.in_features, shared.block, shared.skip, inputs)
        sizes = (self.bits, self.group_size, self.out_features, self.in_features)
        return group, PackedSite(name, name, *sizes, own)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, act_bits={self.act_bits}, bias={self.bias is not None}"
        )
