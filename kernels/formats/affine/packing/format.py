"""Bit-packed integer codes.

A tensor of `bits`-wide codes is stored as bit planes whose widths are powers of two. 2, 4 and 8 bits are one plane;
3 bits are a plane of the low two bits followed by a plane of the high bit. Within a plane, code `i` of the last
dimension sits in 32-bit word `i * width // 32`, lowest field first. In the plane of single bits the order differs: the
bit of code 16b + 4j + i (i < 4, j < 4, b < 2) of a word is bit 8j + 4b + i. A shift and a mask then bring four codes
and their high bits into the same four bytes, as byte-wise dot products (dp4a, VNNI) take them. The last dimension is
padded with zero codes to a multiple of 32, so a row of `n` codes takes `ceil(n / 32) * bits` words.

    codes   int32 (out_features, words)          one row per output feature
    scales  fp16  (out_features, groups)         fp32 where a row's weights lie outside fp16's range
    zeros   int32 (words,)                       the (out_features, groups) zero codes, flattened, then packed

A weight is `scale * (code - zero)` with `zero = zero_code + 1/2`. The half step makes a symmetric grid possible, which
at 2 bits is the difference between four useful levels and three.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
ZERO_OFFSET = 0.5
WORD = 32


def _offsets(width: int, device: torch.device) -> Tensor:
    """Bit at which each code's field starts in its word, int32 (32 / width,)."""
    offsets = torch.arange(0, WORD, width, dtype=torch.int32, device=device)
    return offsets.view(4, 2, 4).transpose(0, 1).flatten() if width == 1 else offsets


def packed_words(count: int, bits: int) -> int:
    """Number of int32 words that hold `count` codes of `bits` bits."""
    return -(-count // WORD) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last dimension.

    Args:
        codes: integer tensor (..., n), every value in [0, 2**bits).
        bits: 2, 3, 4 or 8.

    Returns:
        int32 tensor (..., packed_words(n, bits)).
    """
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[-1] % WORD))
    words, shift = [], 0
    for width in PLANES[bits]:
        field = (padded >> shift) & ((1 << width) - 1)
        field = field.unflatten(-1, (-1, WORD // width))
        words.append((field << _offsets(width, codes.device)).sum(-1))
        shift += width
    packed = torch.cat(words, -1)
    # int64 -> int32 keeps the low 32 bits: the top bit becomes the sign, as the unpacker's mask expects.
    return packed.to(torch.int32)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: int32 (..., words) to int32 codes (..., count)."""
    blocks = packed.shape[-1] // bits
    codes, start, shift = None, 0, 0
    for width in PLANES[bits]:
        plane = packed[..., start : start + blocks * width].unsqueeze(-1)
        field = ((plane >> _offsets(width, packed.device)) & ((1 << width) - 1)).flatten(-2)
        codes = field if codes is None else codes | (field << shift)
        start += blocks * width
        shift += width
    assert codes is not None
    return codes[..., :count]


def unpack_at(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """Codes at positions `index` (any shape) of one packed row, int32 (words,); no others are unpacked."""
    blocks = packed.shape[-1] // bits
    codes, start, shift = None, 0, 0
    for width in PLANES[bits]:
        fields = WORD // width
        offset = _offsets(width, packed.device)[index % fields]
        field = (packed[start + index // fields] >> offset) & ((1 << width) - 1)
        codes = field if codes is None else codes | (field << shift)
        start += blocks * width
        shift += width
    assert codes is not None
    return codes


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups of input columns; the last one may be short. `group_size` -1 is the whole row."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Packed weight to a dense (out_features, in_features) tensor of `dtype`; the arithmetic is fp32."""
    zero_codes = unpack(zeros, bits, scales.numel()).view(scales.shape)
    return scaled(unpack(codes, bits, in_features), scales, zero_codes, group_size, dtype)


def scaled(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Dequantise unpacked codes (..., in_features) by scales and zero codes (..., groups) to `dtype`."""
    in_features, groups = codes.shape[-1], scales.shape[-1]
    q, zero, scale = codes.to(torch.float32), zeros.to(torch.float32) + ZERO_OFFSET, scales.to(torch.float32)
    if groups > 1:
        padding = groups * group_size - in_features
        if padding:
            q = torch.nn.functional.pad(q, (0, padding))
        q = q.unflatten(-1, (groups, group_size))
        dense = ((q - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)
        if padding:
            dense = dense[..., :in_features]
    else:
        dense = (q - zero) * scale
    return dense.to(dtype)
