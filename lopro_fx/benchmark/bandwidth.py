"""Read bandwidth of this machine's memory, the limit of decoding, since each token reads all weights."""

from __future__ import annotations

import time
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu")
_DEFAULT_CACHE = 64 << 20
_SMALLEST = 256 << 20


def read_bandwidth(size: int | None = None, repeats: int = 7) -> float:
    """Measure the bytes a second at which torch's threads sum a large tensor: the best of several runs.

    Args:
        size: bytes to read; by default four times the last-level cache, 256 MiB at least.
        repeats: runs that count, after one that doesn't.
    """
    size = max(_SMALLEST, 4 * last_level_cache()) if size is None else size
    values = torch.ones(size // 8, dtype=torch.int64, device="cpu")
    best = float("inf")
    for run in range(repeats + 1):
        started = time.perf_counter()
        values.sum()
        if run:
            best = min(best, time.perf_counter() - started)
    return 8 * len(values) / best


def last_level_cache() -> int:
    """Bytes of the largest cache of any core, where Linux tells; otherwise 64 MiB."""
    sizes = [_bytes(path.read_text(encoding="utf-8").strip()) for path in _CACHES.glob("cpu[0-9]*/cache/index*/size")]
    return max(sizes, default=_DEFAULT_CACHE)


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
