"""Progress with time left. Long work takes a `Progress` callback; the default draws a bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

# (work done, work in all, what is being done now)
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, label: str) -> None:
    """Report nothing."""


@contextmanager
def bar(title: str, enabled: bool | None = None) -> Iterator[Progress]:
    """A progress bar on standard error; by default only where that is a terminal."""
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[label]}"))  # fmt: skip
    # The stream as it is now: what runs inside may silence a library by putting another in its place.
    with Bar(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(title, total=None, label="")

        def update(done: int, total: int, label: str) -> None:
            shown.update(task, completed=done, total=total, label=label)

        yield update
