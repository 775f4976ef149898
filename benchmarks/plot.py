"""Draws docs/frontier.png from the results of benchmarks/frontier.py and benchmarks/peers.py; needs matplotlib."""

from __future__ import annotations

import json
from typing import Any

import matplotlib as mpl

from benchmarks.accuracy_tables import peer_name
from benchmarks.common import RESULTS, ROOT

_SIZE = (7.5, 4.8)
# First word of the rows of each peer; llama.cpp's are named by the type alone.
_PEERS = {"llama.cpp": "", "GPTQModel": "gptqmodel", "HQQ": "hqq", "AutoRound": "autoround"}


def _rows(name: str) -> list[dict[str, Any]]:
    return sorted(json.loads((RESULTS / f"{name}.json").read_text())["rows"], key=lambda row: row["bits_per_weight"])


def main() -> None:
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=_SIZE)
    own = _rows("frontier")
    kinds = {
        "lopro_fx, budget": _kind(own, "budget"),
        "lopro_fx, one setting": _kind(own, "trellis"),
        "lopro_fx, window=16": [row for row in own if "window" in row["row"]],
    }
    for (label, rows), marker in zip(kinds.items(), "o^*", strict=True):
        axes.plot(*_points(rows), marker=marker, label=label, linestyle="none" if "window" in label else "-")
    for (label, kind), marker in zip(_PEERS.items(), "sxdv", strict=True):
        rows = [row for row in _rows("peers") if (row["row"].startswith(kind) if kind else "-" not in row["row"])]
        if not rows:
            continue
        axes.scatter(*_points(rows), marker=marker, label=label)
        if not kind:
            for row in rows:
                axes.annotate(peer_name(row["row"]).split()[-1], (row["bits_per_weight"], row["kl"]), fontsize=7,
                              xytext=(4, 3), textcoords="offset points")  # fmt: skip
    axes.set(xlabel="bits per weight of the quantised layers, everything counted", ylabel="KL divergence, nats a token",
             yscale="log", title="SmolLM2-135M, 32 x 512 tokens of calibration, WikiText-2")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "frontier.png", dpi=120)


def _kind(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Rows of a kind with the default settings."""
    known = {"rank", "window", "plain"}
    return [row for row in rows if row["row"].startswith(kind) and not set(row["row"].split("-")) & known]


def _points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["bits_per_weight"] for row in rows], [row["kl"] for row in rows]


if __name__ == "__main__":
    main()
