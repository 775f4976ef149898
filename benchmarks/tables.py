"""Tables of README.md and docs/ from benchmarks/results: `python -m benchmarks.tables` writes them between their marks.

A table stands between `<!-- table NAME -->` and `<!-- end -->`. With --check nothing is written, and the exit status is
1 where a table differs from the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT

_MARK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
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
_SERVING = {
    "decode-smollm2-4": "SmolLM2-135M, decode of 64 tokens, 4 bits against Q4_0",
    "prefill-smollm2-4": "SmolLM2-135M, prefill of 512 tokens, 4 bits against Q4_0",
    "decode-wide-4": "wide, decode, 4 bits against Q4_0",
    "decode-wide-3": "wide, decode, 3 bits against Q3_K_S",
    "decode-wide-2": "wide, decode, 2 bits against Q2_K",
    "decode-wide-4-bf16": "wide, decode, 4 bits against `torch.compile` in bf16, static cache",
    "decode-wide-3-bf16": "the same, 3 bits",
    "decode-wide-2-bf16": "the same, 2 bits",
    "decode-smollm2-4-bf16": "SmolLM2-135M, decode, 4 bits against the same",
    "memory-smollm2-3": "SmolLM2-135M, peak memory of generation, 3 bits against eager bf16",
    "memory-wide-3": "wide, peak memory of generation, 3 bits against eager bf16",
}
_SERVING_AVX2 = {
    "decode-wide-4-trellis": "decode, trellis 4 bits against affine 4 bits",
    "decode-wide-3-trellis": "decode, trellis 3 bits against affine 3 bits",
    "decode-wide-2-trellis": "decode, trellis 2 bits against affine 2 bits",
    "prefill-wide-3-trellis": "prefill of 512 tokens, trellis 3 bits against affine 3 bits",
    "decode-wide-3-iq": "decode, trellis 3 bits against IQ3_XXS of ik_llama.cpp",
    "decode-wide-2-iq": "decode, trellis 2 bits against IQ2_XXS of ik_llama.cpp",
    "decode-wide-3-kt": "decode, trellis 3 bits against IQ3_KT of ik_llama.cpp",
    "decode-wide-2-kt": "decode, trellis 2 bits against IQ2_KT of ik_llama.cpp",
}
_GPU = {
    "decode 8192x28672": "28672×8192, 1",
    "decode 4096x14336": "14336×4096, 1",
    "trellis 1": "28672×8192, 1, trellis",
    "trellis 2048": "28672×8192, 2048, trellis",
    "prefill 2048": "28672×8192, 2048",
    "prefill 8192": "28672×8192, 8192",
}
_CONTENDERS = {
    "bf16": "bf16",
    "site 2": "2 bits, rotation, rank 16",
    "site 3": "3 bits, rotation, rank 16",
    "site 4": "4 bits, rotation, rank 16",
    "matmul 4": "4 bits",
    "int4pack": "`aten::_weight_int4pack_mm`, 4 bits",
    "dense 4": "4 bits, rotation, rank 16",
    "w4a8, step a token": "4 bits, int8 activations, rotation",
}
_BRIEF = ("decode-smollm2-4", "prefill-smollm2-4", "decode-wide-4", "decode-wide-3", "decode-wide-2", "memory-wide-3")
_TASKS = ("hellaswag", "piqa", "arc_easy", "winogrande")

# Rows of the frontier in the README.
_FRONTIER = (
    "budget-2.35-asymmetric", "budget-2.65", "budget-3.05-window-16", "budget-3.35", "budget-4.15", "hqq-3", "IQ2_XXS",
    "IQ3_XXS", "Q2_K", "Q4_0",
)  # fmt: skip
_BRANCH = (
    "trellis-2-rank-8", "budget-2.18", "trellis-2-rank-16", "budget-2.35", "trellis-2-rank-32", "budget-2.65",
    "trellis-3-rank-16", "budget-3.35",
)  # fmt: skip
# Rows of the format "affine".
_AFFINE = {"flrq": "FLRQ", "fixed": "fixed rank, not rotated", "rotated": "LoPRo, the same rank"}
_KINDS = {"q_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up", "down_proj": "down"}
# Largest ranks of a column of the histogram.
_RANKS = (0, 4, 8, 16, 32, 64)
# Names of packages in benchmarks/peers.py; all in groups of 64.
_PEERS = {"gptqmodel": "GPTQModel", "hqq": "HQQ", "autoround": "AutoRound"}


def quality() -> str:
    """Perplexity and accuracy of each setting."""
    rows = {row["row"]: row for row in _rows("accuracy")}
    lines = []
    for name, label in _SETTINGS.items():
        row = rows[name]
        bits = f"{row['bits_per_weight']:.2f}".removesuffix(".00")
        lines.append((label, bits, f"{row['perplexity']:.2f}"))
    return _table(("setting", "bits per weight", "perplexity"), lines)


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
    return _table(("", "bits per weight", "perplexity", "times fp32", "KL", "same token"), lines)


def frontier_brief() -> str:
    """Some rows and columns of it, for the README."""
    lines = [
        (name, f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}", f"{row['kl']:.3f}")
        for name, row in _by_size()
        if row["row"] in _FRONTIER
    ]
    return _table(("setting", "bits per weight", "perplexity", "KL"), lines)


def stories() -> str:
    """Settings and budgets of stories260k."""
    return _measured([(_own_name(row["row"]), row) for row in _in_order(_rows("frontier_stories"))])


def branch() -> str:
    """Low-rank branches of the trellis, and budgets of their sizes without one."""
    rows = [row for row in _rows("frontier") if row["row"] in _BRANCH]
    return _measured([(_own_name(row["row"]), row) for row in _in_order(rows)])


def flexible() -> str:
    """FLRQ, a fixed rank without a rotation, and LoPRo, of one size; 3 bits in groups of 64 and the like."""
    rows = [row for row in _rows("frontier") if row["row"].split("-")[0] in _AFFINE]
    return _measured([(_own_name(row["row"]), row) for row in _in_order(rows)])


def chosen_ranks() -> str:
    """Shared inputs by the rank that FLRQ chose, by bits and kind of layer."""
    lines = []
    for row in _rows("frontier"):
        if row["row"].startswith("flrq"):
            for kind, label in _KINDS.items():
                found = [rank for name, rank in row["ranks"].items() if name.endswith(kind)]
                counts = Counter(next(top for top in _RANKS if rank <= top) for rank in found)
                mean = f"{sum(found) / len(found):.1f}"
                lines.append((row["row"][-1], label, *(str(counts[top] or "") for top in _RANKS), mean))
    lows = (0, *(top + 1 for top in _RANKS[:-1]))
    heads = (str(top) if low == top else f"{low} to {top}" for low, top in zip(lows, _RANKS, strict=True))
    return _table(("bits", "input of", *heads, "mean"), lines)


def zero_shot() -> str:
    """Accuracy on tasks, with standard errors."""
    known = [*_rows("accuracy"), *_rows("frontier"), *_rows("peers")]
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
    return _table(("", "bits per weight", "HellaSwag", "PIQA", "ARC-easy", "WinoGrande", "mean"), lines)


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["bits_per_weight"])


def _by_size() -> list[tuple[str, dict[str, Any]]]:
    own = [row for row in _rows("frontier") if row["row"].split("-")[0] in ("budget", "trellis")]
    return [(_any_name(row["row"]), row) for row in _in_order([*own, *_rows("peers")])]


def _any_name(row: str) -> str:
    if row == "fp32":
        return row
    return _own_name(row) if row.split("-")[0] in ("budget", "trellis", *_AFFINE) else peer_name(row)


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


def serving(names: Iterable[str] = _SERVING, labels: Mapping[str, str] = _SERVING, result: str = "serving") -> str:
    """Both sides of every case of benchmarks/serving.py."""
    rows = {row["row"]: row for row in _rows(result)}
    lines = []
    for name in names:
        row = rows[name]
        memory = "peak_rss_mb" in row
        ours, theirs = row["peak_rss_mb" if memory else "tokens_per_second"]
        unit, digits = ("MB" if memory else "tokens/s"), 0 if ours >= 300 else 1
        lines.append((labels[name], f"{ours:.{digits}f} {unit}", f"{theirs:.{digits}f}", f"{row['ratio']:.2f}"))
    return _table(("case", "lopro_fx", "other side", "ratio"), lines)


def linears() -> str:
    """One Linear on a CPU: microseconds, and how many times faster than bf16."""
    lines = [
        (row["shape"], str(row["tokens"]), row["case"], f"{row['us'] / 1000:.2f} ms", f"{row['times bf16']:.1f}")
        for row in _rows("cpu_linear")
        if "shape" in row
    ]
    return _table(("weight", "tokens", "kernel", "time", "times bf16"), lines)


def gpu(cases: Iterable[str] = _GPU) -> str:
    """Products on a GPU: microseconds, and how many times faster than bf16."""
    lines = []
    for case in cases:
        found = {row["contender"]: row for row in _rows("gpu_linear") if row["case"] == case and "microseconds" in row}
        for name, row in found.items():
            if (label := _CONTENDERS.get(name)) and "form" not in row:
                times = f"{row['speed_beside_bf16']:.2f}"
                lines.append((_GPU[case], label, f"{row['microseconds']:.1f} us", times))
    return _table(("weight, tokens", "product", "time", "times bf16"), lines)


def solving() -> str:
    """Time to solve one layer, on the CPU and on the GPU."""
    sides = [{row["case"]: row for row in _rows(name)} for name in ("solve_layer", "gpu_solve_layer")]

    def cells(case: str, column: str, formats: tuple[str, str]) -> list[str]:
        return [
            format(rows[case][column], form) if case in rows else "" for rows, form in zip(sides, formats, strict=True)
        ]

    lines = [
        (case, *cells(case, "seconds", (".0f", ".2f")), *cells(case, "relative_loss", (".5f", ".5f")))
        for case in sides[0]
    ]
    return _table(("method", "CPU, s", "H100, s", "loss, CPU", "loss, H100"), lines)


def trellis() -> str:
    """Relative loss of one layer's units by choice of the trellis format, and seconds to solve them."""
    lines = [
        (row["case"], *(f"{100 * loss:.3f} %" for loss in row["losses"]), f"{row['seconds']:.0f} s")
        for row in _rows("trellis") if "case" in row
    ]  # fmt: skip
    return _table(("choice", "q/k/v", "o", "gate/up", "down", "time"), lines)


def searching() -> str:
    """Microseconds a weight of the trellis's search, by instruction set, bits and window."""
    rows = [row for row in _rows("trellis") if "search" in row]
    times = {(row["search"], row["bits"], row["window"]): f"{1e6 / row['weights_per_second']:.2f} us" for row in rows}
    sizes = sorted({row["window"] for row in rows})
    lines = [
        (path, str(bits), *(times[path, bits, window] for window in sizes))
        for path, bits in dict.fromkeys((row["search"], row["bits"]) for row in rows)
    ]
    return _table(("instructions", "bits", *(f"window {window}" for window in sizes)), lines)


def sketches() -> str:
    """Seconds of a low-rank approximation, and its squared error over that of the best."""
    cells = {(row["case"], row["iterations"], tuple(row["shape"])): row for row in _rows("sketch")}
    shapes = list(dict.fromkeys(shape for _, _, shape in cells))
    lines = []
    for case, its in dict.fromkeys((case, its) for case, its, _ in cells):
        rows = [cells[case, its, shape] for shape in shapes if (case, its, shape) in cells]
        found = [text for row in rows for text in (f"{row['seconds']:.2f} s", f"{row['error_over_best']:.4f}")]
        lines.append((case, str(its or ""), *found, *[""] * (2 * (len(shapes) - len(rows)))))
    heads = [text for m, n in shapes for text in (f"{m}×{n}", "error")]
    return _table(("approximation", "iterations", *heads), lines)


def families() -> str:
    """What became of every architecture, by step."""
    columns = [name for name in _rows("families")[0] if name not in ("architecture", "seconds")]
    lines = []
    for column in columns:
        outcomes = Counter(row.get(column, "-").partition(":")[0] for row in _rows("families"))
        outcomes.pop("-", None)
        rest = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()) if outcome != "ok")
        lines.append((column, str(outcomes["ok"]), rest))
    return _table(("step / head bits", "as transformers", "others"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality,
    "frontier": frontier,
    "frontier-brief": frontier_brief,
    "serving": serving,
    "serving-avx2": lambda: serving(_SERVING_AVX2, _SERVING_AVX2, "serving_avx2"),
    "serving-brief": lambda: serving(_BRIEF),
    "linears": linears,
    "families": families,
    "gpu": gpu,
    "solving": solving,
    "trellis": trellis,
    "searching": searching,
    "sketches": sketches,
    "branch": branch,
    "flexible": flexible,
    "chosen-ranks": chosen_ranks,
    "zero-shot": zero_shot,
    "stories": stories,
}


def filled(text: str) -> str:
    """The text with every table as the results give it."""
    return _MARK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def pages() -> list[Path]:
    """Every page that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [page for page in pages() if filled(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'its tables differ from the results' if check else 'written'}")
        if not check:
            page.write_text(filled(page.read_text()))
    sys.exit(bool(check and stale))


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rule = tuple("---" for _ in head)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


if __name__ == "__main__":
    main()
