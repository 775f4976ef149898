"""Packed modules that multiply activations: Linears and experts, and the input that several of them share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lopro_fx.huggingface.modules import PackedEmbedding, PackedModule, PackedWeight, layout_of
from lopro_fx.kernels.activation.delivery import ACTIVATIONS
from lopro_fx.kernels.formats.registry import dequantize, known_format, rounding_operands
from lopro_fx.layer import Input, Layer, Transform, branch, dense_weight, factor_of

_SHARED = ("perm", "signs", "down", "down_scale")


class PackedInput(PackedModule):
    """Permutation, signs and down factor that several products apply to their shared input, which a checkpoint has
    once. Calling it returns the four tensors.
    """

    perm: Tensor | None
    signs: Tensor | None
    down: Tensor | None
    down_scale: Tensor | None

    def __init__(self, shared: Input) -> None:
        super().__init__()
        self.block, self.skip = shared.transform.block, shared.transform.skip
        self.activation = shared.activation
        self._hold(shared.tensors, _SHARED)

    def forward(self) -> tuple[Tensor | None, ...]:
        return self.held(_SHARED)

    def extra_repr(self) -> str:
        return f"block={self.block}, skip={self.skip}, rank={0 if self.down is None else self.down.shape[0]}"


class PackedProduct(PackedWeight):
    """Packed weight that multiplies the activations of a `PackedInput`, with a low-rank branch.

    Each product rotates its input itself, also where several share it. The one that the input is named after holds it
    under `input`; the others refer to it.
    """

    # Names of the tensors of the branch, in the order of the operators' operands.
    branch_names: ClassVar[tuple[str, ...]]
    # Dimension of the components of `up`.
    up_dim: ClassVar[int]
    # Kind of the format's operator that is compiled for CPUs.
    native_kind: ClassVar[str]
    in_features: int
    act_bits: int
    _shared: tuple[PackedInput]

    def _set_up(self, layer: Layer, shared: PackedInput, owner: bool, dtype: torch.dtype, activations: str) -> None:
        self.in_features, self.layout, self.dtype = layer.in_features, layout_of(layer), dtype
        self.act_bits = ACTIVATIONS[activations]
        if owner:
            self.input = shared
        self._shared = (shared,)
        # Not in `forward`: torch.compile can't trace a look at an operator's schema.
        self._group = self._group_operand()

    @property
    def shared(self) -> PackedInput:
        return self._shared[0]

    def native(self, x: Tensor, gradients: bool) -> Any:
        """The compiled kernel, which has no derivative, if it serves x and rounds as `shared` says; else None."""
        if gradients or x.device.type != "cpu" or self._group is None:
            return None
        return self.operator(self.native_kind)

    def native_rounding(self) -> dict[str, int]:
        """Operands by which the compiled kernel rounds the input."""
        rounded = self.shared.activation
        return {"act_bits": self.act_bits if rounded is None else rounded.bits, **(self._group or {})}

    def _group_operand(self) -> dict[str, int] | None:
        """Operand for the columns that share a step; None where the compiled kernel is absent, or can't have them."""
        operator = self.operator(self.native_kind)
        own = known_format(self.layout.format).activation_group(self.layout, self.shared.block > 1)
        rounded = self.shared.activation
        return None if operator is None else rounding_operands(operator, own, own if rounded is None else rounded.group)

    def turned(self, x: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
        """Rotate x by the input's tensors; return it with its latent, None without a branch."""
        perm, signs, down, down_scale = tensors
        if perm is not None or self.shared.block > 1:
            x = torch.ops.lopro.rotate(x, perm, signs, self.shared.block, self.shared.skip)
        return x, None if down is None else torch.ops.lopro.project(x, down, down_scale)

    def rounded(self, x: Tensor, gradients: bool) -> Tensor:
        """Round a rotated x as `shared` says, if it does."""
        if (rounding := self.shared.activation) is None:
            return x
        whole = torch.ops.lopro.round_activation(x, rounding.bits, rounding.group)
        # Straight-through estimator: the rounding's own derivative is zero.
        return x + (whole - x).detach() if gradients else whole

    def dense(self) -> Tensor:
        return dense_weight(*self.as_packed("")).to(self.dtype)

    def as_packed(self, name: str) -> tuple[Input, Layer]:
        """Return the tensors as passes take them; the input has this layer alone."""
        shared, own = self.shared, _given(_SHARED, self.shared())
        low = _given(self.branch_names, self.held(self.branch_names))
        transform = Transform(own.get("perm"), own.get("signs"), shared.block, shared.skip)
        input = Input(name, (name,), self.in_features, transform, factor_of("down", own, 0), shared.activation)
        up = factor_of("up", low, self.up_dim)
        return input, Layer(name, name, self.packed(), up, cells=low.get("cells"), core=low.get("core"))


class PackedLinear(PackedProduct, nn.Linear):
    """Linear over packed weights: (..., in_features) to (..., out_features) in the input's dtype.

    Args:
        layer: packed tensors and their layout.
        shared: its input's tensors.
        owner: whether this is the Linear whose state holds `shared`.
        plain: the Linear that it replaces, whose bias it keeps.
        activations: "float", or "int8" to round the rotated input per token on a CPU. A rounding in `shared` holds on
            every device instead. With gradients, "int8" rounds nothing, and the rounding in `shared` passes them.
        table: the embedding that holds the weight, if one does.
    """

    branch_names = ("up", "up_scale")
    native_kind = "cpu"
    up_dim = 1
    up: Tensor | None
    up_scale: Tensor | None
    # Whether the module that it replaces stores its weight as (in_features, out_features).
    transposed = False

    def __init__(
        self,
        layer: Layer,
        shared: PackedInput,
        owner: bool,
        plain: nn.Linear,
        activations: str,
        table: PackedEmbedding | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features = layer.out_features
        self._set_up(layer, shared, owner, plain.weight.dtype, activations)
        self._hold(layer.tensors, self.branch_names if table else (*layer.weight.tensors, *self.branch_names))
        self.register_parameter("bias", plain.bias)
        self._table = () if table is None else (table,)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        shared = self.shared
        perm, signs, down, down_scale = shared()
        operands = (x, perm, signs, shared.block, shared.skip, down, down_scale, *self.table_tensors(), self.bias,
                    self.up, self.up_scale, *self.numbers)  # fmt: skip
        gradients = _asks_for_gradients(operands)
        if (native := self.native(x, gradients)) is not None:
            return native(*operands, **self.native_rounding())
        if shared.activation is None:
            return self.operator("site")(*operands)
        x, latent = self.turned(x, (perm, signs, down, down_scale))
        low = (self.bias, latent, self.up, self.up_scale)
        return self.operator("linear")(self.rounded(x, gradients), *self.table_tensors(), *low, *self.numbers)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.describe()}, "
            f"act_bits={self.act_bits}, bias={self.bias is not None}"
        )


class PackedExperts(PackedProduct):
    """Products of tokens with the packed weights of their experts, of one parameter of a module of experts.

    (tokens, in_features), ids (tokens * slots,) and slots, see `lopro::routed_linear`, to (tokens * slots,
    out_features) in the input's dtype.

    Args:
        layer: packed tensors and their layout.
        shared: its input's tensors.
        owner: whether the input is named after this parameter.
        plain: the parameter that it replaces.
        transposed: whether that is (experts, in_features, out_features).
        activations: as in `PackedLinear`. With gradients, all experts' weights are unpacked.
    """

    branch_names = ("up", "up_scale", "cells", "core")
    native_kind = "cpu_experts"
    up_dim = -1
    # transformers initialises what stands under the parameter's name, unless this says that it needn't.
    _is_hf_initialized = True
    _table = ()

    def __init__(
        self, layer: Layer, shared: PackedInput, owner: bool, plain: Tensor, transposed: bool, activations: str
    ) -> None:
        super().__init__()
        self._set_up(layer, shared, owner, plain.dtype, activations)
        self._hold(layer.tensors, (*layer.weight.tensors, *self.branch_names))
        self.transposed = transposed

    def forward(self, x: Tensor, ids: Tensor, slots: int) -> Tensor:
        shared = self.shared
        tensors = perm, signs, down, down_scale = shared()
        own, low = self.table_tensors(), self.held(self.branch_names)
        gradients = _asks_for_gradients((x, *tensors, *own, *low))
        if (native := self.native(x, gradients)) is not None:
            return native(x, ids, slots, perm, signs, shared.block, shared.skip, down, down_scale, *own, *low,
                          *self.numbers, **self.native_rounding())  # fmt: skip
        if not gradients and shared.activation is None:
            return self.operator("experts_site")(
                x, ids, slots, perm, signs, shared.block, shared.skip, down, down_scale, *own, *low, *self.numbers
            )
        x, latent = self.turned(x, tensors)
        rounded = self.rounded(x, gradients)
        if not gradients:
            return self.operator("experts")(rounded, ids, slots, *own, latent, *low, *self.numbers)
        y = torch.ops.lopro.routed_linear(rounded, ids, dequantize(self.packed(), x.dtype), slots)
        input, layer = self.as_packed("")
        if input.down is None or layer.up is None:
            return y
        return y + torch.ops.lopro.routed_linear(x, ids, branch(input.down, layer).to(x.dtype), slots)

    def extra_repr(self) -> str:
        experts, rows, columns = self.layout.shape
        return (
            f"experts={experts}, in_features={columns}, out_features={rows}, {self.describe()}, "
            f"act_bits={self.act_bits}"
        )


def _asks_for_gradients(operands: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(operand, Tensor) and operand.requires_grad for operand in operands
    )


def _given(keys: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in zip(keys, tensors, strict=True) if tensor is not None}
