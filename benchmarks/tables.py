"""Tables of README.md and docs/ from benchmarks/results: `python -m benchmarks.tables` writes them between their marks.

A table stands between `<!-- table NAME -->` and `<!-- end -->`. With --check nothing is written, and the exit status is
1 where a table differs from the results.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks import accuracy_tables as accuracy
from benchmarks import learned_tables
from benchmarks.common import ROOT
from benchmarks.table import rows_of, table

_MARK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
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
_SERVING_MOE = {
    "decode-moe-4-ik": "decode of 64 tokens, 4 bits against Q4_0 of ik_llama.cpp",
    "decode-moe-2-ik": "decode of 64 tokens, 2 bits against IQ2_XXS of ik_llama.cpp",
    "prefill-moe-4-ik": "prefill of 512 tokens, 4 bits against Q4_0 of ik_llama.cpp",
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


def _cpu_experts() -> str:
    """Decode of a layer of experts on a CPU."""
    lines = [
        (
            row["row"],
            f"{row['milliseconds']:.2f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
            f"{row['times_batched_mm']:.1f}",
        )
        for row in rows_of("cpu_experts")
    ]
    return table(("one token, two of 8 experts of 2048 x 7168", "ms", "spread", "times batched_mm"), lines)


def _gpu_experts() -> str:
    """A layer of experts on a GPU."""
    lines = []
    for row in rows_of("gpu_experts"):
        overhead = f"{100 * row['overhead']:+.0f} %" if "overhead" in row else ""
        note = " (rotation apart)" if "form" in row else ""
        lines.append((row["case"].replace("1 tokens", "1 token"), row["contender"] + note,
                      f"{row['microseconds']:.1f} us", f"{row['speed_beside_bf16']:.2f}", overhead))  # fmt: skip
    return table(("tokens", "experts", "time", "times the faster bf16", "of the factors"), lines)


def _cpu_decode() -> str:
    """Products of a decoder on a CPU, the trellis beside the affine format."""
    lines = [(str(row["bits"]), str(row["tokens"]), f"{row['affine_ms']:.1f} ms", f"{row['trellis_ms']:.1f} ms",
              f"{row['ratio']:.2f}") for row in rows_of("cpu_decode")]  # fmt: skip
    return table(("bits", "tokens", "affine", "trellis", "ratio"), lines)


def _cpu_prefill() -> str:
    """Prefill with rounded activations on a CPU."""
    lines = [(row["case"], f"{row['ms']:.0f} ms", f"{row['times bf16']:.2f}", f"{row['times torchao']:.2f}")
             for row in rows_of("cpu_prefill")]  # fmt: skip
    return table(("512 tokens, 4 layers", "median", "times bf16", "times torchao, bf16"), lines)


def _moe_edit() -> str:
    """Steps around the rounding of a large mixture."""
    lines = [
        (row["step"], f"{row['seconds']:.1f} s", f"{row['peak_bytes'] / 2**30:.2f} GiB") for row in rows_of("moe_edit")
    ]
    return table(("step", "time", "peak memory so far"), lines)


def serving(names: Iterable[str] = _SERVING, labels: Mapping[str, str] = _SERVING, result: str = "serving") -> str:
    """Both sides of every case of benchmarks/serving.py."""
    rows = {row["row"]: row for row in rows_of(result)}
    lines = []
    for name in names:
        row = rows[name]
        memory = "peak_rss_mb" in row
        ours, theirs = row["peak_rss_mb" if memory else "tokens_per_second"]
        unit, digits = ("MB" if memory else "tokens/s"), 0 if ours >= 300 else 1
        lines.append((labels[name], f"{ours:.{digits}f} {unit}", f"{theirs:.{digits}f}", f"{row['ratio']:.2f}"))
    return table(("case", "lopro_fx", "other side", "ratio"), lines)


def linears() -> str:
    """One Linear on a CPU: microseconds, and how many times faster than bf16."""
    lines = [
        (row["shape"], str(row["tokens"]), row["case"], f"{row['us'] / 1000:.2f} ms", f"{row['times bf16']:.1f}")
        for row in rows_of("cpu_linear")
        if "shape" in row
    ]
    return table(("weight", "tokens", "kernel", "time", "times bf16"), lines)


def gpu(cases: Iterable[str] = _GPU) -> str:
    """Products on a GPU: microseconds, and how many times faster than bf16."""
    lines = []
    for case in cases:
        found = {
            row["contender"]: row for row in rows_of("gpu_linear") if row["case"] == case and "microseconds" in row
        }
        for name, row in found.items():
            if (label := _CONTENDERS.get(name)) and "form" not in row:
                times = f"{row['speed_beside_bf16']:.2f}"
                lines.append((_GPU[case], label, f"{row['microseconds']:.1f} us", times))
    return table(("weight, tokens", "product", "time", "times bf16"), lines)


def solving() -> str:
    """Time to solve one layer, on the CPU and on the GPU."""
    sides = [{row["case"]: row for row in rows_of(name)} for name in ("solve_layer", "gpu_solve_layer")]

    def cells(case: str, column: str, formats: tuple[str, str]) -> list[str]:
        return [
            format(rows[case][column], form) if case in rows else "" for rows, form in zip(sides, formats, strict=True)
        ]

    lines = [
        (case, *cells(case, "seconds", (".0f", ".2f")), *cells(case, "relative_loss", (".5f", ".5f")))
        for case in sides[0]
    ]
    return table(("method", "CPU, s", "H100, s", "loss, CPU", "loss, H100"), lines)


def trellis() -> str:
    """Relative loss of one layer's units by choice of the trellis format, and seconds to solve them."""
    lines = [
        (row["case"], *(f"{100 * loss:.3f} %" for loss in row["losses"]), f"{row['seconds']:.0f} s")
        for row in rows_of("trellis") if "case" in row
    ]  # fmt: skip
    return table(("choice", "q/k/v", "o", "gate/up", "down", "time"), lines)


def searching() -> str:
    """Microseconds a weight of the trellis's search, by instruction set, bits and window."""
    rows = [row for row in rows_of("trellis") if "search" in row]
    times = {(row["search"], row["bits"], row["window"]): f"{1e6 / row['weights_per_second']:.2f} us" for row in rows}
    sizes = sorted({row["window"] for row in rows})
    lines = [
        (path, str(bits), *(times[path, bits, window] for window in sizes))
        for path, bits in dict.fromkeys((row["search"], row["bits"]) for row in rows)
    ]
    return table(("instructions", "bits", *(f"window {window}" for window in sizes)), lines)


def sketches() -> str:
    """Seconds of a low-rank approximation, and its squared error over that of the best."""
    cells = {(row["case"], row["iterations"], tuple(row["shape"])): row for row in rows_of("sketch")}
    shapes = list(dict.fromkeys(shape for _, _, shape in cells))
    lines = []
    for case, its in dict.fromkeys((case, its) for case, its, _ in cells):
        rows = [cells[case, its, shape] for shape in shapes if (case, its, shape) in cells]
        found = [text for row in rows for text in (f"{row['seconds']:.2f} s", f"{row['error_over_best']:.4f}")]
        lines.append((case, str(its or ""), *found, *[""] * (2 * (len(shapes) - len(rows)))))
    heads = [text for m, n in shapes for text in (f"{m}×{n}", "error")]
    return table(("approximation", "iterations", *heads), lines)


def families() -> str:
    """What became of every architecture, by step."""
    columns = [name for name in rows_of("families")[0] if name not in ("architecture", "seconds")]
    lines = []
    for column in columns:
        outcomes = Counter(row.get(column, "-").partition(":")[0] for row in rows_of("families"))
        outcomes.pop("-", None)
        rest = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()) if outcome != "ok")
        lines.append((column, str(outcomes["ok"]), rest))
    return table(("step / head bits", "as transformers", "others"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "quality": accuracy.quality,
    "frontier": accuracy.frontier,
    "frontier-brief": accuracy.frontier_brief,
    "serving": serving,
    "serving-moe": lambda: serving(_SERVING_MOE, _SERVING_MOE, "serving_moe"),
    "serving-avx2": lambda: serving(_SERVING_AVX2, _SERVING_AVX2, "serving_avx2"),
    "serving-brief": lambda: serving(_BRIEF),
    "linears": linears,
    "families": families,
    "gpu": gpu,
    "solving": solving,
    "trellis": trellis,
    "searching": searching,
    "sketches": sketches,
    "activations": accuracy.activations,
    "branch": accuracy.branch,
    "experts": accuracy.experts,
    "cpu-experts": _cpu_experts,
    "moe-edit": _moe_edit,
    "cpu-decode": _cpu_decode,
    "cpu-prefill": _cpu_prefill,
    "gpu-experts": _gpu_experts,
    "flexible": accuracy.flexible,
    "chosen-ranks": accuracy.chosen_ranks,
    "zero-shot": accuracy.zero_shot,
    "stories": accuracy.stories,
    "learned": lambda: learned_tables.learned("learned"),
    "learned-stories": lambda: learned_tables.learned("learned_stories"),
    "cache": learned_tables.cache,
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


if __name__ == "__main__":
    main()
