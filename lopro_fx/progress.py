"""Progress with time left. Long work takes a `Progress` callback; on a terminal a bar shows it, elsewhere lines."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lopro_fx import streams

# (work done, work in all, what is being done now)
Progress = Callable[[int, int, str], None]

SECONDS = 10.0  # between two lines
# When the process last wrote a line: without it, many short steps in a row would print nothing.
_last = time.monotonic()


def silent(done: int, total: int, label: str) -> None:
    """Report nothing."""


@contextmanager
def bar(title: str, enabled: bool | None = None) -> Iterator[Progress]:
    """Show a progress bar on standard error; by default only where that is a terminal."""
    if not (_terminal() if enabled is None else enabled):
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[label]}"))  # fmt: skip
    # Bound now: work inside may replace sys.stderr to silence a library, and the bar would vanish with it.
    with Bar(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(title, total=None, label="")

        def update(done: int, total: int, label: str) -> None:
            if total != shown.tasks[0].total and shown.tasks[0].completed:
                shown.reset(task)  # another part of the work, with a speed of its own
            shown.update(task, completed=done, total=total, label=label)

        yield update


@contextmanager
def reporting(title: str) -> Iterator[Progress]:
    """Show the bar on a terminal; elsewhere print a line every ten seconds, also while the work reports nothing."""
    if _terminal():
        with bar(title, enabled=True) as progress:
            yield progress
        return
    lines, over = _Lines(title), threading.Event()
    clock = threading.Thread(target=lines.run, args=(over,), daemon=True)
    clock.start()
    try:
        yield lines.update
    finally:
        over.set()
        clock.join()


class _Lines:
    """State of one piece of work, and the loop that prints it."""

    def __init__(self, title: str) -> None:
        self._title, self._stream, self._begun = title, sys.stderr, time.monotonic()
        self._part, self._state = self._begun, (0, 0, "")

    def update(self, done: int, total: int, label: str) -> None:
        if total != self._state[1]:
            self._part = time.monotonic()
        self._state = done, total, label

    def run(self, over: threading.Event) -> None:
        global _last  # noqa: PLW0603  one standard error for all
        while not over.wait(max(0.0, _last + SECONDS - time.monotonic())):
            streams.note(f"lopro-fx: {self._line()}", self._stream)
            _last = time.monotonic()

    def _line(self) -> str:
        (done, total, label), now = self._state, time.monotonic()
        parts = [f"{self._title}: {_clock(now - self._begun)} so far"]
        if total and done:
            left = (now - self._part) * (total - done) / done
            parts = [f"{self._title}: {100 * done // total} %, {_clock(now - self._begun)} so far, {_clock(left)} left"]
        return ", ".join([*parts, label] if label else parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _terminal() -> bool:
    return bool(sys.stderr and not sys.stderr.closed and sys.stderr.isatty())
