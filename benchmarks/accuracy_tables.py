"""Tables of accuracy: what benchmarks/accuracy.py, frontier.py and peers.py measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from benchmarks.table import rows_of, table

_SETTINGS = {
    "fp32": "fp32",
    "torchao-rtn-3-g64": "RTN of torchao 0.18, asymmetric, 3 bits g64",
    "gptq-3-g64": "GPTQ, act-order with static groups, 3 bits g64",
    "hadamard-3-g32": "random-sign block Hadamard + GPTQ (`rank=0`), 3 bits g32",
    "lopro-3-g64-unweighted": "LoPRo, rank 19, 3 bits g64, tokens count the same",
    "lopro-3-g64": '**LoPRo, rank 19, 3 bits g64, `importance="gradient"`**',
    "trellis-4": '`format="trellis"`, no branch, 4 bits',
    "trellis-3-rank16": '`format="trellis"`, rank 16, 3 bits',
    "trellis-3": '**`format="trellis"`, no branch, 3 bits**',
    "hadamard-2-g32": "random-sign block Hadamard + GPTQ (`rank=0`), 2 bits g32",
    "lopro-2-g64": '**LoPRo, rank 19, 2 bits g64, `importance="gradient"`**',
    "trellis-2": '**`format="trellis"`, no branch, 2 bits**',
}
_TASKS = ("hellaswag", "piqa", "arc_easy", "winogrande")

# Rows of the frontier in the README.
_FRONTIER = (
    "budget-2.35", "budget-2.65", "budget-3.05-window-16-plain", "gptqmodel-3", "budget-3.35",
    "budget-4.15", "budget-4.15-plain", "IQ3_XXS", "Q2_K", "Q4_0",
)  # fmt: skip
_BRANCH = (
    "trellis-2", "budget-2.03", "trellis-2-rank-8", "trellis-2-rank-16", "budget-2.35", "trellis-2-rank-32",
    "budget-2.65", "trellis-3", "trellis-3-rank-16", "budget-3.35",
)  # fmt: skip
# Rows of the mixture of experts, without the number of bits.
_EXPERTS = {
    "rtn": "RTN",
    "gptq": "GPTQ",
    "lopro": "LoPRo, no branch",
    "groups-32": "the same, groups of 32",
    "lopro-rank-16": "LoPRo, rank 16 for each expert",
    "lopro-rank-32": "LoPRo, rank 32 for each expert",
    "tileq-paper": "`TileQ.paper()`, rank 32",
    "tileq-16-no-core": "TileQ without cores, rank 16",
    "tileq-32-no-core": "TileQ without cores, rank 32",
    "tileq-16": "**TileQ, rank 16**",
    "tileq-32": "**TileQ, rank 32**",
    "tileq-32-scale": 'the same, `whitening="scale"`',
    "tileq-32-once": "the same, `tile_refits=0`",
    "tileq-32-twice": "the same, `tile_refits=2`",
    "trellis": "LoPRo, trellis, no branch",
    "tileq-16-trellis": "TileQ, trellis, rank 16",
    "tileq-32-trellis": "TileQ, trellis, rank 32",
}
# Rows of benchmarks/activations.py.
_ACTIVATIONS = {
    "w4a16": "LoPRo, 4-bit weights alone",
    "w4a8": "LoPRo, 8-bit activations",
    "rtn": "RTN",
    "gptq": "GPTQ",
    "rotated": "rotation and GPTQ (`LoPRo`, tokens alike)",
    "rotated-act-32": "rotation and GPTQ, groups of 32 for activations",
    "rotated-32": "rotation and GPTQ, groups of 32 for both",
    "rotated-rank-40": "rotation and GPTQ, a branch of rank 40 for the error of the weights",
    "lrc-0-paper": "`LRC(rank=0)`, all of the target",
    "lrc-0": "`LRC(rank=0)`, half of it",
    "lrc-10-paper": "LRC, factors a tenth of the weights, all of the target",
    "lrc-10-paper-5": "LRC, a tenth, all of the target, `iterations=5`",
    "lrc-30-paper": "LRC, three tenths, all of the target",
    "lrc-10": "LRC, a tenth, half of the target",
    "lrc-10-deflated": "LRC, a tenth, half of the target, `deflated=True`",
    "lrc-20": "LRC, two tenths, half of the target",
    "lrc-30": "LRC, three tenths, half of the target",
    "rotated-best": "LoPRo, importance and asymmetry",
    "rotated-32-best": "LoPRo, importance and asymmetry, groups of 32 for both",
    "lrc-0-best": "LRC, importance and asymmetry, no branch",
    "lrc-10-best": "LRC, importance and asymmetry, a tenth",
    "lrc-10-best-5": "LRC, importance and asymmetry, a tenth, `iterations=5`",
    "lrc-10-32-best": "LRC, importance and asymmetry, a tenth, groups of 32 for both",
    "lrc-20-best": "LRC, importance and asymmetry, two tenths",
    "lrc-30-best": "LRC, importance and asymmetry, three tenths",
}
# Rows of the formats "trellis" and "affine".
_TRELLIS = ("budget", "trellis")
_AFFINE = {
    "flrq": "FLRQ",
    "fixed": "rank 1, not rotated",
    "rotated": "LoPRo, rank 8",
    "groups": "LoPRo without a branch, budget",
}
_KINDS = {"q_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up", "down_proj": "down"}
# Largest ranks of a column of the histogram.
_RANKS = (0, 4, 8, 16, 32, 64)
# Names of packages in benchmarks/peers.py; all in groups of 64.
_PEERS = {"gptqmodel": "GPTQModel", "hqq": "HQQ", "autoround": "AutoRound"}


def quality() -> str:
    """Perplexity and accuracy of each setting."""
    rows = {row["row"]: row for row in rows_of("accuracy")}
    lines = []
    for name, label in _SETTINGS.items():
        row = rows[name]
        bits = f"{row['bits_per_weight']:.2f}".removesuffix(".00")
        lines.append((label, bits, f"{row['perplexity']:.2f}"))
    return table(("setting", "bits per weight", "perplexity"), lines)


def frontier() -> str:
    """Budgets, uniform settings and other quantisers by true bits: perplexity, its ratio to the unquantised one, KL and
    agreement."""
    return _measured(_by_size())


def _measured(rows: Iterable[tuple[str, dict[str, Any]]]) -> str:
    lines = [
        (
            name, f"{row['bits_per_weight']:.3f}", f"{row['perplexity']:.2f}",
            f"{row['perplexity'] / row['original']:.3f}", f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}",
            f"{100 * row['top1']:.1f} %",
        )
        for name, row in rows
    ]  # fmt: skip
    return table(("", "bits per weight", "perplexity", "times fp32", "KL", "same token"), lines)


def frontier_brief() -> str:
    """Some rows and columns of it, for the README."""
    lines = [
        (name, f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}", f"{row['kl']:.3f}")
        for name, row in _by_size()
        if row["row"] in _FRONTIER
    ]
    return table(("setting", "bits per weight", "perplexity", "KL"), lines)


def stories() -> str:
    """Settings and budgets of stories260k."""
    rows = [row for row in rows_of("frontier_stories") if row["row"].split("-")[0] in _TRELLIS]
    return _measured([(_own_name(row["row"]), row) for row in _in_order(rows)])


def branch() -> str:
    """A low-rank branch of the trellis, and budgets of its size and below without one."""
    rows = [row for row in rows_of("frontier") if row["row"] in _BRANCH]
    return _measured([(_own_name(row["row"]), row) for row in _in_order(rows)])


def experts() -> str:
    """The mixture of experts: true bits, of them those of the experts' factors, perplexity, KL, agreement."""
    lines = []
    for row in rows_of("moe"):
        name, _, bits = row["row"].rpartition("-")
        order = (int(bits), list(_EXPERTS).index(name))
        lines.append((order, (
            f"{_EXPERTS[name]}, {bits} bits", f"{row['bits_per_weight']:.3f}", f"{row['low_rank_bits']:.3f}",
            f"{row['perplexity']:.2f}", f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}", f"{100 * row['top1']:.1f} %",
        )))  # fmt: skip
    heads = ("", "bits per weight", "factors of experts", "perplexity", "KL", "same token")
    return table(heads, [line for _, line in sorted(lines)])


def activations() -> str:
    """4-bit activations: rounding, rotation, and low-rank correction."""
    rows = {row["row"]: row for row in rows_of("activations")}
    return _measured([(label, rows[name]) for name, label in _ACTIVATIONS.items() if name in rows])


def flexible() -> str:
    """FLRQ, a fixed rank without a rotation, and LoPRo, of one size; 3 bits in groups of 64 and the like."""
    rows = [row for row in rows_of("frontier") if row["row"].split("-")[0] in _AFFINE]
    return _measured([(_own_name(row["row"]), row) for row in _in_order(rows)])


def chosen_ranks() -> str:
    """Shared inputs by the rank that FLRQ chose, by bits and kind of layer."""
    lines = []
    for row in rows_of("frontier"):
        if row["row"].startswith("flrq"):
            for kind, label in _KINDS.items():
                found = [rank for name, rank in row["ranks"].items() if name.endswith(kind)]
                counts = Counter(next(top for top in _RANKS if rank <= top) for rank in found)
                mean = f"{sum(found) / len(found):.1f}"
                lines.append((row["row"][-1], label, *(str(counts[top] or "") for top in _RANKS), mean))
    lows = (0, *(top + 1 for top in _RANKS[:-1]))
    heads = (str(top) if low == top else f"{low} to {top}" for low, top in zip(lows, _RANKS, strict=True))
    return table(("bits", "input of", *heads, "mean"), lines)


def zero_shot() -> str:
    """Accuracy on tasks, with standard errors."""
    known = [*rows_of("accuracy"), *rows_of("frontier"), *rows_of("peers")]
    rows = _in_order([row for row in known if "winogrande" in row])
    lines = [
        (
            name, f"{row['bits_per_weight']:.2f}".removesuffix(".00"),
            *(f"{100 * row[task]:.1f} ± {100 * row[f'{task}_stderr']:.1f}" for task in _TASKS),
            f"{100 * sum(row[task] for task in _TASKS) / len(_TASKS):.1f}",
        )
        for row in rows
        for name in [_any_name(row["row"])]
    ]  # fmt: skip
    return table(("", "bits per weight", "HellaSwag", "PIQA", "ARC-easy", "WinoGrande", "mean"), lines)


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["bits_per_weight"])


def _by_size() -> list[tuple[str, dict[str, Any]]]:
    own = [row for row in rows_of("frontier") if row["row"].split("-")[0] in _TRELLIS]
    return [(_any_name(row["row"]), row) for row in _in_order([*own, *rows_of("peers")])]


def _any_name(row: str) -> str:
    if row == "fp32":
        return row
    return _own_name(row) if row.split("-")[0] in (*_TRELLIS, *_AFFINE) else peer_name(row)


def _own_name(row: str) -> str:
    kind, bits, *more = row.split("-")
    if kind in _AFFINE:
        return f"{_AFFINE[kind]}, {bits} bits" + (", `asymmetry=0`" if "plain" in more else "")
    name = f"budget of {bits} bits" if kind == "budget" else f"{bits} bits for all"
    if more[:1] == ["rank"]:
        name += f", rank {more[1]}"
    window = ", `window=16`" if "window" in more else ""
    return f"**{name}{window}{', `asymmetry=0`' if 'plain' in more else ''}**"


def peer_name(row: str) -> str:
    """Name of a row of benchmarks/peers.py for readers."""
    kind, *bits = row.split("-")
    return f"{_PEERS[kind]}, {bits[0]} bits" if bits else f"llama.cpp {row}"
