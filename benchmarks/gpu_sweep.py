"""Tile constants of the decode kernel, tried one after the other: `python -m benchmarks.gpu_linear --sweep`."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_sites import product_call, random_input, random_sites, whole_site
from benchmarks.gpu_timing import DEVICE, Contender, measure, save
from lopro_fx.kernels import dispatch
from lopro_fx.kernels.decode import device as decode
from lopro_fx.kernels.packing.format import WORD
from lopro_fx.kernels.tiles import main_width

BLOCKS, WORDS, WARPS, SPLITS = (16, 32, 64), (64, 128, 256), (4, 8), (1, 2, 4, 8)
BITS = (2, 3, 4)
_REPETITIONS, _SHOWN = 20, 5


@dataclass(frozen=True)
class Tile:
    """Rows and words of a step, warps of a program, parts of the columns."""

    block_n: int
    words: int
    warps: int
    splits: int

    def product(self, *args: Any) -> Tensor:
        """`decode_product` with these constants, launched without the operator around it."""
        changes = {
            "wrap_triton": lambda kernel: _Launcher(kernel, self.warps),
            "_BLOCK_N": self.block_n,
            "_block_words": lambda _rows: self.words,
        }
        with mock.patch.multiple(decode, **changes):
            return decode.product(*args)


@dataclass(frozen=True)
class _Launcher:
    """A kernel whose launches have `warps` warps a program, whatever they ask for."""

    kernel: Any
    warps: int

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        launch = self.kernel[grid]
        return lambda *args, **options: launch(*args, **{**options, "num_warps": self.warps})


def tiles(k: int, n: int, bits: int, processors: int) -> list[Tile]:
    """All that leave each part of the columns a step or more, and each multiprocessor 2 to 16 programs."""
    words = k // WORD * main_width(bits)
    return [tile for tile in itertools.starmap(Tile, itertools.product(BLOCKS, WORDS, WARPS, SPLITS))
            if tile.splits * tile.words <= words
            and 2 * processors <= -(-n // tile.block_n) * tile.splits <= 16 * processors]  # fmt: skip


def sweep(shapes: Sequence[tuple[int, int]], folder: Path | None) -> None:
    """Print the fastest tiles for each shape and width; saved only where a folder is named."""
    rows: list[dict[str, Any]] = []
    for (k, n), bits in itertools.product(shapes, BITS):
        x, sites = random_input(1, k), random_sites(k, n, bits)
        expected = whole_site("", x, sites).expected
        timed = []
        for tile in tiles(k, n, bits, dispatch.processors(DEVICE)):
            calls = [product_call(x, site, tile.splits, tile.product) for site in sites]
            contender = Contender(str(tile), calls, expected)
            error = contender.error()
            seconds = measure([contender], _REPETITIONS)[contender.name].median
            timed.append({"shape": [k, n], "bits": bits, **asdict(tile), "microseconds": seconds * 1e6, "error": error})
        timed.sort(key=lambda row: row["microseconds"])
        print(f"{k}x{n}, {bits} bits")
        for row in timed[:_SHOWN]:
            print("  " + ", ".join(f"{key} {row[key]}" for key in ("block_n", "words", "warps", "splits")),
                  f"{row['microseconds']:.1f} us, error {row['error']:.1e}", flush=True)  # fmt: skip
        rows += timed
        del x, sites, expected
        gc.collect()
        torch.cuda.empty_cache()
        if folder:
            save("gpu_sweep", folder, rows, repetitions=_REPETITIONS)
