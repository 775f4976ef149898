"""Interface of a format.

A format is one class: `empty` and `dequantize` define it. The other methods have defaults that hold if each tensor has
one row per output feature; other formats override them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from lopro_fx.kernels.activation.reference import group_for
from lopro_fx.kernels.formats.packed import Packed, Scalar
from lopro_fx.kernels.formats.quantizer import Quantizer


class Format:
    """A way to store a weight (out_features, in_features). Register one object of a subclass.

    `spec` names what `empty` needs beside the shape; its defaults have the types of the operators' scalars. The first
    tensor has one row per output feature.
    """

    name: ClassVar[str]
    spec: ClassVar[Mapping[str, Scalar]] = {}
    # Further operators, by the kind that passes look for: "cpu", compiled code for CPUs, takes the operands of `_site`
    # without prologue and residual, `act_bits`, and `act_group` if it rounds in other groups than `activation_group`.
    operators: ClassVar[Mapping[str, str]] = {}
    # What solvers round with; None for a format that only its own method writes.
    quantizer: ClassVar[type[Quantizer] | None] = None

    @property
    def prefix(self) -> str:
        """Prefix of its operators' names: `lopro::<prefix>_linear`, `_site` and `_embedding`."""
        return self.name

    def empty(self, shape: tuple[int, ...], spec: Mapping[str, Scalar]) -> Packed:
        """Tensors of the right shapes and dtypes on the meta device, in the order of the operators' operands.

        A tensor whose dtype depends on the weight has the usual one here.
        """
        raise NotImplementedError

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features) of `dtype`: the definition, against which every kernel is tested."""
        raise NotImplementedError

    def lookup(self, packed: Packed, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` (any shape) of `dequantize`: (*ids.shape, in_features)."""
        self._require_rows("looked up in", packed)
        rows = {name: embedding(ids.flatten(), tensor) if tensor.dim() == 2 else tensor[ids.flatten()]
                for name, tensor in packed.tensors.items()}  # fmt: skip
        part = replace(packed, shape=(ids.numel(), packed.shape[1]), tensors=rows)
        return self.dequantize(part, dtype).view(*ids.shape, packed.shape[1])

    def cat(self, parts: Sequence[Packed]) -> Packed | str:
        """Concatenate weights of one input and spec along out_features, or return the reason why that can't be."""
        if not self.has_rows(parts[0]):
            return f"the rows of a weight in format '{self.name}' can't be joined"
        rows = sum(part.shape[0] for part in parts)
        names = parts[0].tensors
        return replace(
            parts[0],
            shape=(rows, parts[0].shape[1]),
            tensors={name: torch.cat([part.tensors[name] for part in parts]) for name in names},
        )

    def permute_rows(self, packed: Packed, order: Tensor) -> Packed | str:
        """Permute the rows by `order`, int64 (out_features,), or return the reason why that can't be."""
        if not self.has_rows(packed):
            return f"the rows of a weight in format '{self.name}' can't be reordered"
        return packed.map(lambda tensor: tensor[order])

    def kernels(self) -> Sequence[Kernel]:
        """Faster kernels of the operators, best first. Where all of them refuse, the definition runs."""
        return ()

    def inductor_options(self, folder: Path) -> AbstractContextManager[dict[str, Any]]:  # noqa: ARG002
        """Context with AOTInductor's options for a program with the "cpu" operator; compile inside it.

        Args:
            folder: empty, with a path that a command line takes, for libraries to link.

        Raises:
            BuildError: the kernel could not be built.
        """
        return nullcontext({})

    def activation_group(self, packed: Packed, rotated: bool) -> int:  # noqa: ARG002
        """Columns of an activation that share a step, where the kernels may choose."""
        return group_for(rotated)

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of its tensors, in the order of the operators' operands."""
        return tuple(self.empty((32, 32), self.spec).tensors)

    def of(self, named: Mapping[str, Any], in_features: int) -> Packed:
        """The packed weight among the operands of an operator, by their names; of experts, for "experts"."""
        tensors = {name: named[name] for name in self.tensor_names}
        lead = next(iter(tensors.values())).shape[: 2 if "slots" in named else 1]
        return Packed(self.name, (*lead, in_features), {key: named[key] for key in self.spec}, tensors)

    def has_rows(self, packed: Packed) -> bool:
        """Whether each tensor has one row an output feature."""
        return all(tensor.dim() > 0 and tensor.shape[0] == packed.shape[0] for tensor in packed.tensors.values())

    def _require_rows(self, what: str, packed: Packed) -> None:
        if not self.has_rows(packed):
            raise NotImplementedError(f"rows can't be {what} a weight in format '{self.name}': it has no `lookup`")


@dataclass(frozen=True)
class Kernel:
    """One implementation of a format's operator.

    Args:
        name: as reports show it.
        operator: kind, one of `registry.KINDS`.
        run: takes the operator's operands by name.
        refuses: the reason why it can't take these operands, by name; None if it can.
    """

    name: str
    operator: str
    run: Callable[..., Tensor]
    refuses: Callable[[Mapping[str, Any]], str | None]
