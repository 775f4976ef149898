"""Standard output and error that may be closed, abandoned by their reader, full, or in a narrow encoding."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import TextIO

# ASCII spellings of characters in tables; any other character that an encoding lacks becomes its escape.
_PLAIN = {"±": "+-", "─": "-", "│": "|", "╶": "-", "╴": "-", "…": "..."}


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(char) or char.encode("ascii", "backslashreplace").decode() for char in lacking), error.end


codecs.register_error("lopro_fx.spelt", _spelt)


def open_closed() -> None:
    """Open closed standard streams, and Python's objects for them, on the null device.

    Otherwise a file opened later gets the free descriptor, and what a library prints goes into it. Where only standard
    error is open, standard output goes there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for the process's life
    sys.stdout = sys.stdout or sys.stderr


def put(stream: TextIO, text: str) -> None:
    """Write text at once, whatever the stream's encoding.

    Raises:
        OSError, ValueError: the stream takes nothing more.
    """
    if stream.encoding:
        text = text.encode(stream.encoding, "lopro_fx.spelt").decode(stream.encoding)
    stream.write(text)
    stream.flush()


def note(text: str, stream: TextIO | None = None) -> None:
    """Write a line to standard error; drop it if the stream takes nothing more, because work goes on without it."""
    stream = stream or sys.stderr
    if stream is None:
        return
    try:
        put(stream, f"{text}\n")
    except (OSError, ValueError):
        abandon(stream)


def abandon(stream: TextIO) -> None:
    """Redirect a broken stream to the null device, so that flushing its buffer at exit raises nothing."""
    with suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
