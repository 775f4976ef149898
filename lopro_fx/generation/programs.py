"""The two programs that generate text, and the layout of their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx.generation.cache import stored_width

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class CacheSpec:
    """Sizes of the KV cache's tensors, in the order of the programs' inputs.

    Args:
        batch_size: rows of every tensor.
        max_cache_len: slots that can be used, one a token, padding included.
        keys, values: (heads, head_dim) of each layer that keeps any; a tensor is (batch_size, heads, max_cache_len + 1,
            head_dim), or `stored_width` of that with `bits`. The last slot stays empty, so that a read never covers the
            whole tensor: torch.export would tell that case apart.
        dtype: of keys and values, e.g. "float32".
        vocabulary: width of the logits.
        bits: 8 or 4 keep each token and head as uint8 rows, see `generation.cache`; 0 keeps numbers of `dtype`.
    """

    batch_size: int
    max_cache_len: int
    keys: list[tuple[int, int]]
    values: list[tuple[int, int]]
    dtype: str
    vocabulary: int
    bits: int = 0

    @property
    def stored_dtype(self) -> torch.dtype:
        """dtype of the tensors."""
        return torch.uint8 if self.bits else getattr(torch, self.dtype)

    def stored_sizes(self) -> list[tuple[int, int]]:
        """(heads, columns) of the tensors, keys before values."""
        return [(heads, stored_width(width, self.bits)) for heads, width in (*self.keys, *self.values)]

    def allocate(self, device: torch.device | str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
        """Zeroed (keys, values)."""
        dtype = self.stored_dtype

        def zeros(heads: int, columns: int) -> Tensor:
            shape = (self.batch_size, heads, self.max_cache_len + 1, columns)
            if torch.device(device).type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=device)
            # NumPy leaves pages of zeros to the system until they are used; torch writes them.
            pages = numpy.zeros(math.prod(shape) * dtype.itemsize, dtype=numpy.uint8)
            return torch.from_numpy(pages).view(dtype).view(shape)

        tensors = [zeros(*size) for size in self.stored_sizes()]
        return tensors[: len(self.keys)], tensors[len(self.keys) :]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, over all rows and layers."""
        columns = sum(heads * columns for heads, columns in self.stored_sizes())
        return self.batch_size * columns * self.stored_dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """Fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CacheSpec:
        """Inverse of `to_dict`, from JSON."""
        sizes = {name: [(int(heads), int(width)) for heads, width in values[name]] for name in ("keys", "values")}
        return cls(**{**values, **sizes})


@dataclass(frozen=True)
class GenerationPrograms:
    """`prefill` takes a prompt of any length in one pass, `decode` one token; both have the same weights and inputs.

    Inputs, all but the first two of int64 too:
        input_ids: (B, S) int64; S is 1 in `decode`.
        position: (1,) slot of the first of them; the others follow.
        padding: (B,) slots at the start of each row that hold padding, not text.
        slots: (L,) 0, 1, … L - 1, at least up to the last slot in use: the length decides how far attention reads.
        keys, values: lists of the cache's tensors (see `CacheSpec`), written in place.
    Output: logits (B, vocabulary) of the last token.
    """

    prefill: ExportedProgram
    decode: ExportedProgram
    cache: CacheSpec

    def map(self, function: Callable[[ExportedProgram], ExportedProgram]) -> GenerationPrograms:
        """Apply `function`, e.g. `lambda program: lopro_fx.apply(program, state)`, to both, and share their weights.

        A tensor that both programs have under one name and with the same values is one tensor afterwards.
        """
        prefill, decode = function(self.prefill), function(self.decode)
        _share(prefill, decode)
        return replace(self, prefill=prefill, decode=decode)

    def items(self) -> tuple[tuple[str, ExportedProgram], tuple[str, ExportedProgram]]:
        """(name, program) of both."""
        return (PREFILL, self.prefill), (DECODE, self.decode)


def _share(source: ExportedProgram, target: ExportedProgram) -> None:
    for mine, theirs in ((source.state_dict, target.state_dict), (source.constants, target.constants)):
        for name, tensor in theirs.items():
            other = mine.get(name)
            if isinstance(tensor, Tensor) and isinstance(other, Tensor) and _same(tensor, other):
                theirs[name] = other


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
