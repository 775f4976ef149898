"""Reading files that may come from elsewhere: regular ones of a known size, and JSON of the expected type."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lopro_fx.errors import CheckpointError, LoProError, first_line

T = TypeVar("T")
# The graph of a model of 100 layers takes some 20 MB.
MOST_JSON = 1 << 28


def require_file(path: Path, most: int | None = None) -> int:
    """Require a regular file, of at most `most` bytes, and return its size. A FIFO or a device could be read for ever.

    Raises:
        CheckpointError: it is missing, no regular file, or larger.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    if most is not None and found.st_size > most:
        raise CheckpointError(f"{path} has {found.st_size:,} bytes, at most {most:,} are read")
    return found.st_size


def read_json(path: Path, kind: type[T], most: int = MOST_JSON) -> T:
    """Read a JSON file whose outermost value is a `kind`.

    Raises:
        CheckpointError: as `require_file`, or it is no JSON, is nested too deeply, or holds another type.
    """
    require_file(path, most)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} is damaged: it holds a {type(value).__name__}, not a {kind.__name__}")
    return value


@contextmanager
def interpreting(source: Path | str) -> Iterator[None]:
    """Report whatever the content of a source makes the code inside raise: it may be of any type and depth.

    Raises:
        CheckpointError: in the place of errors that are not lopro_fx's own.
    """
    try:
        yield
    except (LoProError, MemoryError):
        raise
    except Exception as error:
        said = first_line(error) or type(error).__name__
        raise CheckpointError(f"{source} is damaged: {type(error).__name__}: {said}") from error


def entry(value: Any, key: str, kind: type[T], path: Path) -> T:
    """Value of a key of a JSON object.

    Raises:
        CheckpointError: `value` is no object, lacks the key, or holds another type there.
    """
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise CheckpointError(f"{path} is damaged: its '{key}' is a {type(found).__name__}, not a {kind.__name__}")
    return found
