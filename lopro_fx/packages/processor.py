"""Instruction sets of the processor, which decide where compiled code runs."""

from __future__ import annotations

import platform
import re
from pathlib import Path

# Sets that a compiler for this processor may use; other flags concern operating systems.
_USED = re.compile(r"avx|fma|f16c|bmi|abm|amx|s?sse|popcnt|movbe|vaes|gfni|vpclmul|adx|asimd|sve|i8mm|bf16|fphp")


def instruction_sets() -> list[str]:
    """Names as Linux has them, e.g. avx2 and avx512_vnni; empty where the system doesn't list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return sorted(name for name in set(value.split()) if _USED.match(name))
    return []


def machine() -> str:
    """Architecture and system, e.g. "x86_64 linux"."""
    return f"{platform.machine()} {platform.system().lower()}"


def mismatch(compiled_for: str, needed: list[str]) -> str | None:
    """Say why code compiled for another processor can't run on this one; None if it can."""
    if compiled_for != machine():
        return f"it is for {compiled_for}, this is {machine()}"
    present = instruction_sets()
    missing = sorted(set(needed) - set(present)) if present else []
    return f"this processor lacks {', '.join(missing)}" if missing else None
