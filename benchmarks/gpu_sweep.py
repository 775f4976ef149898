"""Tile constants of the kernels, tried one after the other: `python -m benchmarks.gpu_linear --sweep`."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from benchmarks.gpu_sites import (
    GROUP,
    Site,
    packed_matmul,
    product_call,
    random_input,
    random_sites,
    rounded_site,
    whole_site,
)
from benchmarks.gpu_timing import DEVICE, Contender, measure, save
from lopro_fx.kernels import dispatch
from lopro_fx.kernels.formats.affine.decode import device as decode
from lopro_fx.kernels.formats.affine.dense_int8 import device as dense_int8
from lopro_fx.kernels.formats.affine.linear import device as packed_linear
from lopro_fx.kernels.formats.affine.packed_int8 import device as packed_int8
from lopro_fx.kernels.formats.affine.packing.format import WORD
from lopro_fx.kernels.tiles import main_width

BLOCKS, WORDS, WARPS, STAGES, SPLITS = (16, 32, 64), (64, 128), (4, 8), (2, 3, 4), (1, 2)
BITS = (2, 3, 4)
# (tokens, features, warps, stages) of the matmuls by the tokens that they are tried with.
MATMULS = {
    "batches": {
        16: [(16, 64, 4, 3), (16, 64, 4, 4), (16, 64, 4, 6), (16, 128, 4, 4), (16, 128, 8, 4), (16, 256, 8, 3)],
        64: [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3)],
    },
    "prefill": {
        512: [(64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2),
              (128, 128, 8, 3), (128, 256, 8, 2)],
        8192: [(64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2),
               (128, 128, 8, 3), (128, 256, 8, 2)],
    },
}  # fmt: skip
# (tokens, features) of a product, stages, products of a program.
DENSE_INT8 = [((128, 128), 3, 1), ((128, 128), 4, 1), ((64, 128), 4, 1), ((64, 256), 3, 1), ((64, 256), 3, 2),
              ((64, 256), 4, 2), ((128, 128), 3, 2), ((64, 128), 3, 2)]  # fmt: skip
_EVER = 1 << 30
_REPETITIONS, _SHOWN = 20, 5
_PRINTED = ("tile", "microseconds", "error", "absent")


@dataclass(frozen=True)
class Tile:
    """Rows and words of a step, warps of a program, steps on their way at a time, parts of the columns."""

    block_n: int
    words: int
    warps: int
    stages: int
    splits: int

    def product(self, *args: Any) -> Tensor:
        """`decode_product` with these constants, launched without the operator around it."""
        changes = {
            "wrap_triton": lambda kernel: _Launcher(kernel, self.warps),
            "_block_rows": lambda *_: self.block_n,
            "_block_words": lambda _bits: self.words,
            "_STAGES": self.stages,
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
    return [tile for tile in itertools.starmap(Tile, itertools.product(BLOCKS, WORDS, WARPS, STAGES, SPLITS))
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
            print("  " + ", ".join(f"{key} {row[key]}" for key in ("block_n", "words", "warps", "stages", "splits")),
                  f"{row['microseconds']:.1f} us, error {row['error']:.1e}", flush=True)  # fmt: skip
        rows += timed
        del x, sites, expected
        gc.collect()
        torch.cuda.empty_cache()
        if folder:
            save("gpu_sweep", folder, rows, repetitions=_REPETITIONS)


def sweep_matmuls(shape: tuple[int, int], cases: Sequence[str], folder: Path | None) -> None:
    """Print the fastest tiles of the matmuls for several and for many tokens, of bf16 and of int8 activations."""
    (k, n), rows = shape, []
    for case, bits in itertools.product(cases, BITS):
        sites: list[Site] = random_sites(k, n, bits)
        for tokens, tiles_of in MATMULS[case].items():
            x = random_input(tokens, k)
            rounded = rounded_site("", x, sites, -1, _EVER)
            kinds = [("packed_linear", packed_matmul("", x, sites), tiles_of, partial(_shapes, packed_linear)),
                     ("packed_int8", rounded, tiles_of, partial(_shapes, packed_int8))]  # fmt: skip
            if tokens > dispatch.DENSE_TOKENS:
                kinds.append(("dense_int8", rounded_site("", x, sites, -1), DENSE_INT8, _dense_shapes))
            for name, plain, tried, changed in kinds:
                timed = []
                for tile in tried:
                    row = {"kernel": name, "tokens": tokens, "bits": bits, "tile": tile}
                    try:
                        row |= _timed(partial(changed, tile), plain)
                    except triton.runtime.errors.OutOfResources as error:
                        row |= {"absent": str(error).splitlines()[0]}
                    timed.append(row)
                timed.sort(key=lambda row: row.get("microseconds", math.inf))
                print(f"{name}, {tokens} tokens, {bits} bits, groups of {GROUP}")
                for row in timed[:_SHOWN]:
                    print(
                        "  " + ", ".join(f"{key} {value}" for key, value in row.items() if key in _PRINTED), flush=True
                    )
                rows += timed
        del sites
        gc.collect()
        torch.cuda.empty_cache()
        if folder:
            save("gpu_sweep_matmuls", folder, rows, repetitions=_REPETITIONS)


def _timed(changed: Callable[[], AbstractContextManager[Any]], plain: Contender) -> dict[str, Any]:
    """Time and error of a contender with constants changed."""

    def call(inner: Callable[[], Tensor]) -> Tensor:
        with changed():
            return inner()

    contender = Contender("", [lambda inner=inner: call(inner) for inner in plain.calls], plain.expected)
    error = contender.error()
    seconds = measure([contender], _REPETITIONS)[contender.name].median
    return {"microseconds": round(seconds * 1e6, 1), "error": error}


@contextmanager
def _shapes(module: Any, tile: tuple[int, int, int, int]) -> Iterator[None]:
    """One tile for any number of tokens."""
    with mock.patch.dict(module._SHAPES, dict.fromkeys(module._SHAPES, tile)), \
         mock.patch.object(dispatch, "DENSE_TOKENS", _EVER):  # fmt: skip
        yield


@contextmanager
def _dense_shapes(tile: tuple[tuple[int, int], int, int]) -> Iterator[None]:
    shape, stages, halves = tile
    changes = {"_SHAPES": {halves: shape}, "_STAGES": stages, "choose_halves": lambda *_: halves}
    with mock.patch.multiple(dense_int8, **changes):
        yield
