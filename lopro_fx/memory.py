"""What glibc does with freed memory."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), and the largest values that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST, _LARGEST_BLOCK = (1 << 31) - 1, 1 << 25


def keep_freed_memory() -> None:
    """Keep freed memory in this process, up to 2 GiB; elsewhere than with glibc, do nothing.

    By default the memory of a layer's tensors goes back to the system when they are freed, and each of the next one's
    pages is made anew when it is first written.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc; no such handle on Windows
        return
    mallopt(_TRIM_THRESHOLD, _MOST)
    mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
