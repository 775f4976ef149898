"""Quantised Linears on a GPU beside bf16 and other packed products, each checked against its reference first.

Times are medians over replayed CUDA graphs whose weights are cold; contenders of a case are replayed in turn.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS
from benchmarks.gpu_sites import (
    GROUP,
    Contender,
    decode_only,
    dense,
    gemlite,
    has_gemlite,
    int4pack,
    packed_matmul,
    random_input,
    random_sites,
    random_trellis,
    rounded_site,
    trellis_site,
    whole_site,
)
from benchmarks.gpu_timing import copy_bandwidth, measure, save

LARGE, SMALL = (8192, 28672), (4096, 14336)
# Times faster than bf16 that a whole site has to be, by bits.
BARS = {LARGE: {2: 5.0, 3: 3.8, 4: 3.0}, SMALL: {2: 3.5, 3: 3.0, 4: 2.4}}
BANDWIDTH_BAR, RIVAL_BAR, PREFILL_BAR, INT8_BAR = 0.80, 1.0, 0.85, 1.2
BATCHES, PREFILLS, CROSSOVER = (2, 4, 8, 16), (2048, 8192), (16, 32, 64, 128, 256, 512, 1024)
_EVER = 1 << 30
Row = dict[str, Any]


class Run:
    """Settings of a run, and the rows that it has so far."""

    def __init__(self, repetitions: int, bandwidth: float) -> None:
        self.repetitions, self.bandwidth = repetitions, bandwidth
        self.rows: list[Row] = []

    def time(self, case: str, contenders: Iterable[Contender]) -> dict[str, Row]:
        """Check and time contenders; a row for each, by name, with its speed beside the one called bf16."""
        contenders = list(contenders)
        errors = {contender.name: contender.error() for contender in contenders}
        times = measure(contenders, self.repetitions)
        found = {}
        for contender in contenders:
            name, timing = contender.name, times[contender.name]
            found[name] = {
                "case": case,
                "contender": name,
                "microseconds": timing.median * 1e6,
                "range": [timing.low * 1e6, timing.high * 1e6],
                "error": errors[name],
                "correct": errors[name] <= contender.tolerance,
                **contender.facts,
            }
            if "bf16" in times:
                found[name]["speed_beside_bf16"] = times["bf16"].median / timing.median
        self.rows += found.values()
        return found

    def absent(self, case: str, contender: str, reason: str) -> None:
        self.rows.append({"case": case, "contender": contender, "absent": reason})


def hold(row: Row, what: str, value: float, bar: float) -> None:
    """Put a figure beside the bar that it has to reach."""
    row.setdefault("bars", []).append({"what": what, "value": value, "bar": bar, "pass": value >= bar})


def decode(run: Run, shape: tuple[int, int]) -> None:
    """One token: whole sites, the product alone, and other libraries' products of the same width."""
    case, (k, n) = f"decode {shape[0]}x{shape[1]}", shape
    x = random_input(1, k)
    ours: list[Contender] = []
    for bits in BARS[shape]:
        sites = random_sites(k, n, bits)
        ours += [whole_site(f"site {bits}", x, sites), packed_matmul(f"matmul {bits}", x, sites),
                 decode_only(f"product {bits}", x, sites)]  # fmt: skip
    rivals, widths = _rivals(run, case, n, x)
    rows = run.time(case, [dense(x, n), *ours, *rivals])
    for bits, bar in BARS[shape].items():
        hold(rows[f"site {bits}"], "beside bf16", rows[f"site {bits}"]["speed_beside_bf16"], bar)
        product = rows[f"product {bits}"]
        product["part_of_copy_bandwidth"] = product["bytes"] / product["microseconds"] * 1e6 / run.bandwidth
        if shape == LARGE:
            hold(product, "part of copy bandwidth", product["part_of_copy_bandwidth"], BANDWIDTH_BAR)
    for name, bits in widths.items():
        for own in (f"matmul {bits}", f"site {bits}"):
            value = rows[name]["microseconds"] / rows[own]["microseconds"]
            hold(rows[own], f"beside {name}", value, RIVAL_BAR)


def _rivals(run: Run, case: str, n: int, x: torch.Tensor) -> tuple[list[Contender], dict[str, int]]:
    """Products of other libraries that are here and work, and the width of each."""
    wanted: dict[str, tuple[int, Callable[[str], Contender]]] = {"int4pack": (4, lambda _: int4pack(x, n))}
    for bits in (4, 2):
        for dtype in (torch.bfloat16, torch.float16):
            name = f"gemlite {bits} {str(dtype).removeprefix('torch.')}"
            if has_gemlite():
                wanted[name] = (bits, partial(gemlite, x=x.to(dtype), n=n, bits=bits))
            else:
                run.absent(case, name, "not installed")
    found, widths = [], {}
    for name, (bits, make) in wanted.items():
        try:
            contender = make(name)
            measure([contender], 1)
        except Exception as error:  # another library's failure must not cost our own figures
            run.absent(case, name, f"{type(error).__name__}: {error}".splitlines()[0][:160])
            continue
        found.append(contender)
        widths[name] = bits
    return found, widths


def batches(run: Run) -> None:
    """A few tokens at once."""
    k, n = LARGE
    sites = {bits: random_sites(k, n, bits) for bits in BARS[LARGE]}
    for m in BATCHES:
        x = random_input(m, k)
        run.time(f"batch {m}", [dense(x, n), *(whole_site(f"site {bits}", x, own) for bits, own in sites.items())])


def prefill(run: Run) -> None:
    """Many tokens: weights written out, which is what dispatch chooses, and fused products; both in int8 too."""
    k, n = LARGE
    sites = random_sites(k, n, 4)
    for m in PREFILLS:
        x = random_input(m, k)
        ways = (whole_site("dense 4", x, sites, 1), whole_site("fused 4", x, sites, _EVER))
        steps = {"step a token": -1, "step a group": GROUP}
        rounded = [rounded_site(f"w4a8, {name}", x, sites, act_group, 1) for name, act_group in steps.items()]
        rounded += [
            rounded_site(f"w4a8 fused, {name}", x, sites, act_group, _EVER) for name, act_group in steps.items()
        ]
        rows = run.time(f"prefill {m}", [dense(x, n), *ways, *rounded])
        hold(rows["dense 4"], "beside bf16", rows["dense 4"]["speed_beside_bf16"], PREFILL_BAR)
        if m == PREFILLS[-1]:
            row = rows["w4a8, step a token"]
            hold(row, "beside bf16", row["speed_beside_bf16"], INT8_BAR)


def crossover(run: Run) -> None:
    """The number of tokens from which writing weights out in full is the faster way."""
    k, n = LARGE
    for bits in (2, 4):
        sites, faster = random_sites(k, n, bits), []
        for m in CROSSOVER:
            x = random_input(m, k)
            ways = (whole_site(f"dense {bits}", x, sites, 1), whole_site(f"fused {bits}", x, sites, _EVER))
            rows = run.time(f"crossover {m}", [dense(x, n), *ways])
            times = {name: row["microseconds"] for name, row in rows.items()}
            faster.append((m, "dense" if times[f"dense {bits}"] < times[f"fused {bits}"] else "fused"))
        print(f"{bits} bits, faster by tokens: {', '.join(f'{m} {name}' for m, name in faster)}")


def trellis(run: Run) -> None:
    """The trellis format beside the affine one, for one token, a few and many."""
    k, n = LARGE
    sites = {bits: random_trellis(k, n, bits) for bits in BARS[LARGE]}
    for m in (1, 16, 2048):
        x = random_input(m, k)
        run.time(f"trellis {m}", [dense(x, n), *(trellis_site(f"site {bits}", x, own) for bits, own in sites.items())])


CASES: dict[str, Callable[[Run], None]] = {
    "decode-large": lambda run: decode(run, LARGE),
    "decode-small": lambda run: decode(run, SMALL),
    "batches": batches,
    "prefill": prefill,
    "trellis": trellis,
    "crossover": crossover,
}


def show(row: Row) -> None:
    """One line of the table."""
    head = f"{row['case']:22} {row['contender']:20}"
    if "absent" in row:
        print(f"{head} {row['absent']}")
        return
    low, high = row["range"]
    line = f"{head} {row['microseconds']:9.1f} us ({low:.1f}-{high:.1f})  error {row['error']:.1e}"
    if "speed_beside_bf16" in row:
        line += f"  {row['speed_beside_bf16']:.2f}x bf16"
    if not row["correct"]:
        line += "  WRONG"
    print(line)
    for bar in row.get("bars", ()):
        print(f"{'':43} {bar['what']}: {bar['value']:.2f}, bar {bar['bar']:.2f}: {'pass' if bar['pass'] else 'FAIL'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.gpu_linear")
    parser.add_argument("--quick", action="store_true", help="10 repetitions instead of 60")
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="try tiles of the kernels instead; --only decode-large, decode-small, batches or prefill picks some",
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON; without it only whole runs are saved")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_linear needs a CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.sweep:
        from benchmarks.gpu_sweep import sweep, sweep_matmuls

        wanted = {"decode-large": LARGE, "decode-small": SMALL}
        chosen = args.only or ["batches", "prefill", *wanted]
        sweep([shape for name, shape in wanted.items() if name in chosen], args.out)
        sweep_matmuls(LARGE, [name for name in ("batches", "prefill") if name in chosen], args.out)
        return 0
    folder = args.out or (None if args.quick or args.only else RESULTS)
    repetitions = 10 if args.quick else 60
    run = Run(repetitions, copy_bandwidth())
    print(f"{torch.cuda.get_device_name()}: a copy moves {run.bandwidth / 1e12:.2f} TB/s, read and written")
    cases, failed = args.only or list(CASES), []
    for index, name in enumerate(cases):
        first = len(run.rows)
        try:
            CASES[name](run)
        except Exception:  # one case's failure must not cost the figures of the others
            traceback.print_exc()
            failed.append(name)
        for row in run.rows[first:]:
            show(row)
        sys.stdout.flush()
        # A case's weights take gigabytes, and closures hold on to them in cycles.
        gc.collect()
        torch.cuda.empty_cache()
        if folder:
            save("gpu_linear", folder, run.rows, repetitions=repetitions, copy_bandwidth=run.bandwidth,
                 cases=cases[: index + 1], failed=failed)  # fmt: skip
    wrong = [row for row in run.rows if not row.get("correct", True)]
    bars = [bar for row in run.rows for bar in row.get("bars", ())]
    print(f"{sum(bar['pass'] for bar in bars)} of {len(bars)} bars reached; {len(wrong)} wrong results; "
          f"failed cases: {', '.join(failed) or 'none'}")  # fmt: skip
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
