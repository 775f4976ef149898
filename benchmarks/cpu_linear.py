"""One Linear on the CPU: packed, with rotation and a low-rank branch, against bf16 and fp32 `F.linear`.

Decode reads weights that no cache holds: copies of over 200 MB are read in turn. Both sides are timed in one process,
one after the other in each round, and medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import lopro_fx  # noqa: F401  registers the operators
from benchmarks.common import save_result
from lopro_fx.kernels.cpu import native
from lopro_fx.kernels.formats.affine.packing.format import group_count, packed_words
from lopro_fx.methods.rotation import largest_block

COLD_BYTES = 210_000_000
RANK = 16
Site = tuple[Any, ...]


def random_site(out: int, width: int, bits: int, group_size: int) -> Site:
    """Operands of `lopro::cpu_site` after the activation, without `act_bits`; contents are random."""
    groups = group_count(width, group_size)
    word = torch.iinfo(torch.int32)
    codes = torch.randint(word.min, word.max, (out, packed_words(width, bits)), dtype=torch.int32)
    zeros = torch.randint(word.min, word.max, (packed_words(out * groups, bits),), dtype=torch.int32)
    scales = (torch.rand(out, groups) / (1 << bits)).half()
    signs = torch.randint(0, 256, (-(-width // 8),), dtype=torch.uint8)
    down, up = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((RANK, width), (out, RANK)))
    steps = torch.full((RANK,), 1e-3).half()
    return (None, signs, largest_block(width, 1024), 0, down, steps, codes, scales, zeros, None, up, steps, bits,
            group_size)  # fmt: skip


def copies(site: Site) -> list[Site]:
    """As many copies as no cache holds."""
    count = -(-COLD_BYTES // stored(site))
    return [tuple(v.clone() if isinstance(v, Tensor) else v for v in site) for _ in range(count)]


def stored(site: Site) -> int:
    return sum(v.numel() * v.element_size() for v in site if isinstance(v, Tensor))


def seconds(contenders: dict[str, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, float]:
    """Median seconds of one of the calls that each contender makes, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, (run, count) in contenders.items():
            started = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - started) / count)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def each(sites: list[Site], x: Tensor, act_bits: int) -> Callable[[], None]:
    def run() -> None:
        for site in sites:
            torch.ops.lopro.cpu_site(x, *site, act_bits)

    return run


def decode(out: int, width: int, rounds: int) -> list[dict[str, Any]]:
    x, narrow = torch.randn(1, width), torch.randn(1, width).bfloat16()
    dense = [torch.randn(out, width).bfloat16() for _ in range(-(-COLD_BYTES // (2 * out * width)))]
    # Written, because memory that never was is one page of zeros.
    block = torch.ones(COLD_BYTES // 4)
    sites = {bits: copies(random_site(out, width, bits, 128)) for bits in (2, 3, 4)}
    contenders = {
        "read": (block.sum, 1),
        "bf16": (lambda: [linear(narrow, weight) for weight in dense], len(dense)),
        **{f"{bits} {act}": (each(sites[bits], x, act), len(sites[bits])) for bits in sites for act in (8, 0)},
    }
    times = seconds(contenders, rounds)
    rows = [_row(out, width, 1, "bf16 F.linear", times["bf16"], 2 * out * width, times["bf16"])]
    for bits, group in sites.items():
        for act in (8, 0):
            name = f"{bits} bits g128, {'int8' if act else 'fp32'} activations"
            rows.append(_row(out, width, 1, name, times[f"{bits} {act}"], stored(group[0]), times["bf16"]))
    limit = {"case": "reading memory", "GB/s": round(4 * block.numel() / times["read"] / 1e9, 1)}
    return [limit, *rows]


def prefill(out: int, width: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    x, dense = torch.randn(tokens, width), torch.randn(out, width)
    narrow, dense_narrow = x.bfloat16(), dense.bfloat16()
    sites = {bits: random_site(out, width, bits, 128) for bits in (2, 3, 4)}
    contenders: dict[str, tuple[Callable[[], Any], int]] = {
        "fp32 F.linear": (lambda: linear(x, dense), 1),
        "bf16 F.linear": (lambda: linear(narrow, dense_narrow), 1),
    }
    for bits, site in sites.items():
        for act in (8, 0):
            name = f"{bits} bits g128, {'int8' if act else 'fp32'} activations"
            contenders[name] = (each([site], x, act), 1)
    times = seconds(contenders, rounds)
    return [_row(out, width, tokens, name, value, 0, times["bf16 F.linear"]) for name, value in times.items()]


def _row(
    out: int, width: int, tokens: int, case: str, taken: float, bytes_read: int, baseline: float
) -> dict[str, Any]:
    return {
        "case": case,
        "shape": f"{out}x{width}",
        "tokens": tokens,
        "us": round(taken * 1e6, 1),
        "GB/s": round(bytes_read / taken / 1e9, 1) if bytes_read else None,
        "GOPS": round(2 * tokens * out * width / taken / 1e9, 1),
        "times bf16": round(baseline / taken, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["decode", "prefill"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    path = native.active_path()
    rows: list[dict[str, Any]] = []
    if arguments.only != "prefill":
        for out, width in ((4096, 14336), (14336, 4096)):
            rows += decode(out, width, arguments.rounds)
    if arguments.only != "decode":
        rows += prefill(4096, 4096, 512, arguments.rounds)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if value is not None))
    print(save_result("cpu_linear", rows, path=path, threads=arguments.threads, rounds=arguments.rounds, rank=RANK))


if __name__ == "__main__":
    main()
