"""Forked children that are killed on purpose, or whose time and memory are limited."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopro_fx.errors import LoProError

# Calls to the file system, as Python's audit events name them.
_FILES = ("open", "os.", "shutil.", "tempfile.")


@dataclass(frozen=True)
class Outcome:
    """`kind` is "value", "refused" (an error of lopro_fx), "raw" (another error), "crash", or "hang"."""

    kind: str
    what: Any = None


def outcome(task: Callable[[], Any], seconds: float = 30.0, more_bytes: int = 1 << 30) -> Outcome:
    """Run `task` in a child that may take so much time and memory beyond this process's."""
    child, reader = _forked(lambda writer: _limited(task, writer, more_bytes))
    received, deadline = b"", time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            return Outcome("hang", f"over {seconds:.0f} s")
        part = os.read(reader, 1 << 16)
        if not part:
            break
        received += part
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return Outcome("crash", signal.Signals(os.WTERMSIG(status)).name)
    return Outcome(*pickle.loads(received)) if received else Outcome("crash", f"status {status}")


def killed(task: Callable[[], Any], at: int | None = None, after: float | None = None) -> int | None:
    """Run `task` in a child that dies by SIGKILL before its call `at` to the file system, or `after` seconds.

    Returns:
        The number of its calls to the file system, if it came to its end.
    """
    child, reader = _forked(lambda writer: _counted(task, writer, at))
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    received = os.read(reader, 1 << 12).decode()
    os.close(reader)
    os.waitpid(child, 0)
    assert received == "" or received.isdecimal(), received
    return int(received) if received else None


def _forked(body: Callable[[int], None]) -> tuple[int, int]:
    """Start a child that runs `body` with the end of a pipe to write to; return its number and the other end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        body(writer)
    os.close(writer)
    return child, reader


def _limited(task: Callable[[], Any], writer: int, more_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _quiet()
    try:
        result: tuple[str, Any] = ("value", task())
    except LoProError as error:
        result = ("refused", str(error))
    except BaseException as error:
        result = ("raw", f"{type(error).__name__}: {error}")
    os.write(writer, pickle.dumps(result))
    os._exit(0)


def _counted(task: Callable[[], Any], writer: int, at: int | None) -> None:
    count = 0

    def watch(event: str, _: tuple[Any, ...]) -> None:
        nonlocal count
        if event.startswith(_FILES):
            count += 1  # first: the kill is an event too
            if count - 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)

    _quiet()
    sys.addaudithook(watch)
    try:
        task()
        result = str(count)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    os.write(writer, result.encode())
    os._exit(0)


def _quiet() -> None:
    """Send what the child and its libraries print nowhere, and keep warnings from becoming errors."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
