"""Rows of result files, and tables in Markdown."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows of `benchmarks/results/<name>.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Table of cells, with a rule below the head."""
    rule = tuple("---" for _ in head)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))
