"""Trellis code: weights from windows of a bit string, by a product of integers (QTIP, 2406.11235; code "mul1").

A state of `window` bits gives `columns` neighbouring weights of a row. With the product p = state * MULTIPLIER mod 2^32
and its bytes b0 (lowest) to b3, in units of the row's scale:

    columns = 1    (b0 + b1 + b2 + b3 - 510) / 128
    columns = 2    (b0 + b3 - 255) / 128, (b1 + b2 - 255) / 128

Each step brings `step` = bits * columns new bits. Steps run up a column (or pair), from the last row of a strip to its
first; the state before the last row is 0. The state of row i is the `window` bits from bit `step * i` of the column's
string, least significant first, with zeros after its end. So each weight is read by itself.

    scales  fp16   (out_features,)   fp32 where a row's weights lie outside fp16's range
    codes   int32  (words,)          strip by strip; in a strip column by column; in a column the string of its rows

A strip has `strip` rows, the last one from half to one and a half times as many, filled up to a multiple of 32.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from lopro_fx.kernels.errors import ConfigError

MULTIPLIER = 0x83DCD12D
# Values are integers of this unit; a power of two, so that fp32 holds them without error.
UNIT = 1 / 128
WORD = 32
MAX_WINDOW = 16


def strip_rows(rows: int, strip: int) -> list[int]:
    """Rows of each strip of a weight; `strip` -1 makes one."""
    count = _strips(rows, strip)
    return [*[strip] * (count - 1), rows - (count - 1) * strip] if count > 1 else [rows]


def _strips(rows: int, strip: int) -> int:
    if strip != -1 and (strip < WORD or strip % WORD):
        raise ConfigError(f"strip={strip}: give a multiple of {WORD} rows, or -1 for all")
    return 1 if strip == -1 else max(1, (rows + strip // 2) // strip)


def padded(rows: int) -> int:
    """Rows of a strip's string."""
    return -(-rows // WORD) * WORD


def code_words(shape: tuple[int, ...], step: int, columns: int, strip: int) -> int:
    """Number of int32 words that hold a weight's codes."""
    (rows, width), whole = shape, _strips(shape[0], strip) - 1
    words = (whole * padded(strip) + padded(rows - whole * strip)) // WORD
    return words * step * -(-width // columns)


@cache
def _table(window: int, columns: int) -> Tensor:
    state = torch.arange(1 << window, dtype=torch.int64, device="cpu")
    product = state * MULTIPLIER & 0xFFFFFFFF
    bytes_ = [(product >> shift & 255).to(torch.float32) for shift in (0, 8, 16, 24)]
    if columns == 1:
        return (sum(bytes_[1:], bytes_[0]) - 510).unsqueeze(1) * UNIT
    return torch.stack([bytes_[0] + bytes_[3] - 255, bytes_[1] + bytes_[2] - 255], 1) * UNIT


def table(window: int, columns: int) -> Tensor:
    """Value of every state, fp32 (2^window, columns) on the CPU."""
    return _table(window, columns)


def values(states: Tensor, columns: int) -> Tensor:
    """Values of states, int64 of any shape: fp32 (*shape, columns)."""
    product = states * MULTIPLIER & 0xFFFFFFFF
    first, second, third, fourth = ((product >> shift & 255).to(torch.float32) for shift in (0, 8, 16, 24))
    if columns == 1:
        return (first + second + third + fourth - 510).unsqueeze(-1) * UNIT
    return torch.stack([first + fourth - 255, second + third - 255], -1) * UNIT


def windows(codes: Tensor, shape: tuple[int, ...], step: int, columns: int, window: int, strip: int) -> Tensor:
    """States of every row and column (or pair): int64 (out_features, ceil(in_features / columns))."""
    pairs = -(-shape[1] // columns)
    rows = strip_rows(shape[0], strip)
    words = [padded(part) // WORD * step for part in rows]
    ends = list(accumulate(count * pairs for count in words))
    parts = []
    for part, count, end in zip(rows, words, ends, strict=True):
        own = codes[end - count * pairs : end].view(pairs, count).to(torch.int64) & 0xFFFFFFFF
        own = torch.nn.functional.pad(own, (0, 1))
        bit = torch.arange(part, dtype=torch.int64, device=codes.device) * step
        word = bit // WORD
        both = own[:, word] | own[:, word + 1] << WORD
        parts.append((both >> bit % WORD & (1 << window) - 1).T)
    return torch.cat(parts)


def windows_of(
    codes: Tensor, ids: Tensor, shape: tuple[int, ...], step: int, columns: int, window: int, strip: int
) -> Tensor:
    """States of the rows `ids`, int64 of any shape: (*ids.shape, ceil(in_features / columns))."""
    pairs, rows = -(-shape[1] // columns), strip_rows(shape[0], strip)
    size = shape[0] if strip == -1 else strip
    part = (ids // size).clamp_max(len(rows) - 1)
    whole, last = padded(size) // WORD * step, padded(rows[-1]) // WORD * step
    count = torch.where(part < len(rows) - 1, whole, last).unsqueeze(-1)
    bit = ((ids - part * size) * step).unsqueeze(-1)
    word, column = bit // WORD, torch.arange(pairs, dtype=torch.int64, device=codes.device)
    first = part.unsqueeze(-1) * (whole * pairs) + column * count
    own = codes.to(torch.int64) & 0xFFFFFFFF
    above = torch.where(word + 1 < count, own[(first + word + 1).clamp_max(codes.numel() - 1)], 0)
    return (own[first + word] | above << WORD) >> bit % WORD & (1 << window) - 1


def pack_states(states: Tensor, step: int, strip: int) -> Tensor:
    """Codes of the states (out_features, pairs), int of any width: their `step` low bits, as int32 (words,)."""
    parts = []
    for rows in states.split(strip_rows(states.shape[0], strip)):
        bits = rows.T.to(torch.int64) & (1 << step) - 1
        bits = torch.nn.functional.pad(bits, (0, padded(rows.shape[0]) - rows.shape[0]))
        # WORD rows are `step` words: their bits one by one, then as words.
        places = torch.arange(step, dtype=torch.int64, device=states.device)
        single = (bits.unsqueeze(-1) >> places & 1).flatten(1).unflatten(1, (-1, WORD))
        word = (single << torch.arange(WORD, dtype=torch.int64, device=states.device)).sum(-1)
        parts.append(word.flatten())
    return torch.cat(parts).to(torch.int32)
