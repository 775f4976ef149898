"""Plain text tables, drawn by rich."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], width: int = 140) -> str:
    """Draw a table as text without colour codes; numbers are right-aligned."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row])
    text = StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
