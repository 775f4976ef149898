"""Output of commands: text on standard output, notes on standard error, JSON files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lopro_fx import streams
from lopro_fx.errors import CheckpointError, ConfigError
from lopro_fx.store.files import reason_of, replacing, require_writable


def say(text: object) -> None:
    """Write a line, or a table, to standard output; errors as `show`."""
    show(f"{text}\n")


def show(text: str) -> None:
    """Write text to standard output at once, without adding a newline.

    Raises:
        BrokenPipeError: its reader has gone.
        CheckpointError: it can't be written; the text is on standard error instead.
    """
    try:
        streams.put(sys.stdout, text)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        streams.abandon(sys.stdout)
        streams.note(text.rstrip("\n"))
        raise CheckpointError(f"standard output can't be written: {reason_of(error)}") from error


def check_json_path(path: str | None) -> None:
    """Refuse a file that can't be written before the long work starts.

    Raises:
        ConfigError: it is a folder, its folder is missing, or it can't be written.
    """
    if path is None:
        return
    if Path(path).is_dir() or not Path(os.path.realpath(path)).parent.is_dir():
        raise ConfigError(f"--json {path}: give the name of a file in a folder that exists")
    if Path(path).is_file():
        with Path(path).open("rb") as file:
            begin = file.read(64).lstrip()[:1]
        if begin not in (b"", b"{", b"["):
            raise ConfigError(f"--json {path}: that file is there and is no JSON; name another or delete it")
    try:
        require_writable(Path(path))
    except CheckpointError as error:
        raise ConfigError(f"--json {error}") from error


def deliver(path: str | None, result: dict[str, Any], text: object) -> None:
    """Write `result` as JSON to a file, and `text` to standard output even if the file can't be written.

    Raises:
        CheckpointError: the file or standard output can't be written.
    """
    try:
        write_result(path, result)
    finally:
        say(text)


def write_result(path: str | None, result: dict[str, Any]) -> None:
    """Write `result` as JSON, keys in their order; nothing if `path` is None.

    Raises:
        CheckpointError: the file can't be written.
    """
    if path is None:
        return
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
