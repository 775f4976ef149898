"""NumPy twin of `format.py`, written from the format's text one code at a time; slow on purpose."""

from __future__ import annotations

import numpy as np

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def _bit(index: int, width: int) -> int:
    """Bit of its word at which the field of code `index` starts."""
    if width > 1:
        return index * width % 32
    place = index % 32
    return 8 * (place % 16 // 4) + 4 * (place // 16) + place % 4


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack a 1-D array of codes into uint32 words."""
    blocks = (len(codes) + 31) // 32
    words: list[int] = []
    shift = 0
    for width in _PLANES[bits]:
        plane = [0] * (blocks * width)
        for i, code in enumerate(int(c) for c in codes):
            field = (code >> shift) % (1 << width)
            plane[i * width // 32] |= field << _bit(i, width)
        words += plane
        shift += width
    return np.array(words, dtype=np.uint32)


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Inverse of `pack`, as int64 codes (count,)."""
    blocks = len(words) // bits
    codes = [0] * count
    start = shift = 0
    for width in _PLANES[bits]:
        for i in range(count):
            word = int(words[start + i * width // 32])
            codes[i] |= ((word >> _bit(i, width)) % (1 << width)) << shift
        start += blocks * width
        shift += width
    return np.array(codes, dtype=np.int64)


def dequantize(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_size: int) -> np.ndarray:
    """Dense fp32 weight from unpacked codes (out, in), fp16 scales (out, groups) and zero codes (out, groups)."""
    dense = np.empty(codes.shape, dtype=np.float32)
    for row in range(codes.shape[0]):
        for col in range(codes.shape[1]):
            group = 0 if group_size == -1 else col // group_size
            zero = np.float32(zeros[row, group]) + np.float32(0.5)
            dense[row, col] = (np.float32(codes[row, col]) - zero) * np.float32(scales[row, group])
    return dense
