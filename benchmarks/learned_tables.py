"""Tables of what benchmarks/learned.py and cache.py measured."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.table import rows_of, table

_NAMES = {
    "rtn": "RTN",
    "gptq": "GPTQ",
    "lopro": "LoPRo",
    "flexround-rtn": "FlexRound from RTN",
    "lrq-rtn": "LRQ from RTN",
    "flexround": "**FlexRound from LoPRo (`LRQ()`)**",
    "lrq": 'LRQ from LoPRo (`divisors="low_rank"`)',
}


def _name(row: str) -> str:
    scheme, _, method = row.partition("-") if row.startswith("w4") else ("3 bits", "", row)
    label = "`LRQ()`" if method == "lrq" and scheme != "3 bits" else _NAMES[method]
    return label if scheme == "3 bits" else f"{label}, {scheme.upper()}"


def learned(result: str) -> str:
    """Learned and solved rounding; the mean of a row's seeds, and the half of their range."""
    seeds: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(result):
        seeds.setdefault(row["row"].split(" ")[0], []).append(row)
    lines = []
    for name, rows in seeds.items():
        cells = []
        for key, digits in (("perplexity", 2), ("kl", 4)):
            found = [row[key] for row in rows]
            spread = f" ± {(max(found) - min(found)) / 2:.{digits}f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.{digits}f}{spread}")
        numbers = rows[0]["learned_numbers"] / rows[0]["weights"]
        # None: the run was held up.
        seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
        taken = f"{statistics.mean(seconds):.0f} s" if seconds else ""
        lines.append((_name(name), f"{rows[0]['bits_per_weight']:.3f}", *cells,
                      f"{numbers:.2f}" if numbers else "", taken))  # fmt: skip
    return table(("", "bits per weight", "perplexity", "KL", "learned numbers a weight", "time"), lines)


def cache() -> str:
    """Keys and values by bits."""
    lines = [
        (
            row["row"].removeprefix("cache-").replace("0", "fp32"),
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.5f}",
            f"{row['bytes_per_token']:,}",
            f"{row['bytes_per_token'] / row['bf16_bytes_per_token']:.2f}",
        )
        for row in rows_of("cache")
    ]
    return table(("bits", "perplexity", "KL", "bytes a token", "times bf16"), lines)
