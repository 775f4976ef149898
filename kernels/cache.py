"""Folder for files that can be rebuilt."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$LOPRO_FX_CACHE`, else `$XDG_CACHE_HOME/lopro_fx`, else `~/.cache/lopro_fx`; it need not exist."""
    folder = os.environ.get("LOPRO_FX_CACHE")
    path = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lopro_fx"
    return path.expanduser()
