"""What commands write: text on standard output, notes on standard error, JSON files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lopro_fx.errors import ConfigError
from lopro_fx.files import replacing


def say(text: object) -> None:
    """A line, or a table, on standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def check_json_path(path: str | None) -> None:
    """Refuse a file that can't be written before the long work starts.

    Raises:
        ConfigError: it is a folder, or its folder is missing.
    """
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise ConfigError(f"--json {path}: give the name of a file in a folder that exists")


def write_result(path: str | None, result: dict[str, Any]) -> None:
    """`result` as JSON, keys in their order; nothing if `path` is None.

    Raises:
        CheckpointError: the file can't be written.
    """
    if path is None:
        return
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
