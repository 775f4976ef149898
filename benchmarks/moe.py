"""Accuracy of a mixture of experts against true bits: each expert by itself, and TileQ's shared factors.

The model of tests/assets/moe (benchmarks/train_moe.py). 64 x 256 tokens of c4_calib.txt to calibrate, as many of the
second half of tinystories.txt to measure, which training has not seen. Every stored bit of quantised layers is counted;
`low_rank_bits` are those of the experts' factors, by their weights. Rows are added to the result file as they finish.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import DATA, RESULTS, save_result
from lopro_fx import GPTQ, RTN, Budget, LoPRo, QuantState, TileQ, apply, calibrate
from lopro_fx.evaluation.divergence import divergence
from lopro_fx.evaluation.text import read_text, token_windows
from lopro_fx.layer import stored_bytes
from lopro_fx.methods.rounding import Rounding
from lopro_fx.models.export import export_causal_lm
from lopro_fx.models.load import load_model

MODEL = Path(__file__).resolve().parents[1] / "tests" / "assets" / "moe"
_ROTATED = LoPRo(importance="gradient", rank=0)
_TILES = TileQ(importance="gradient")
_TRELLIS = {"format": "trellis", "group_size": None}


def _rows(bits: int) -> dict[str, tuple[Rounding, Budget | None]]:
    rotated, tiles = replace(_ROTATED, bits=bits), replace(_TILES, bits=bits)
    methods: dict[str, Rounding] = {
        "rtn": RTN(bits=bits),
        "gptq": GPTQ(bits=bits),
        "lopro": rotated,
        "lopro-rank-16": replace(rotated, rank=16),
        "lopro-rank-32": replace(rotated, rank=32),
        "groups-32": replace(rotated, group_size=32),
        "trellis": replace(rotated, **_TRELLIS),
        "tileq-paper": TileQ.paper(bits=bits, group_size=64, rank=0),
        **{f"tileq-{rank}-no-core": replace(tiles, tile_rank=rank, core=False) for rank in (16, 32)},
        **{f"tileq-{rank}": replace(tiles, tile_rank=rank) for rank in (16, 32)},
        "tileq-32-scale": replace(tiles, whitening="scale"),
        "tileq-32-once": replace(tiles, tile_refits=0),
        "tileq-32-twice": replace(tiles, tile_refits=2),
        "tileq-16-trellis": replace(tiles, tile_rank=16, **_TRELLIS),
        "tileq-32-trellis": replace(tiles, **_TRELLIS),
    }
    return {f"{name}-{bits}": (method, None) for name, method in methods.items()}


ROWS = {**_rows(2), **_rows(3)}


def low_rank_bits(state: QuantState) -> float:
    """Bits of the experts' factors by their weights."""
    experts = [layer for layer in state.layers.values() if layer.experts]
    size = sum(
        stored_bytes(t for name, t in layer.tensors.items() if name not in layer.weight.tensors) for layer in experts
    )
    for shared in state.inputs.values():
        if shared.down is not None and any(layer.input == shared.name for layer in experts):
            size += stored_bytes(t for name, t in shared.tensors.items() if name.startswith("down"))
    return 8 * size / max(sum(layer.weights for layer in experts), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"any of {', '.join(ROWS)}; default all")
    args = parser.parse_args()
    loaded = load_model(str(MODEL), torch.float32)
    program = export_causal_lm(loaded.model)
    text = read_text(DATA / "tinystories.txt")
    calibration = token_windows(loaded.tokenizer, read_text(DATA / "c4_calib.txt"), 256, 64)
    windows = token_windows(loaded.tokenizer, text[len(text) // 2 :], 256, 64)
    for name in args.rows or ROWS:
        method, budget = ROWS[name]
        started = time.perf_counter()
        state = calibrate(program, list(calibration.split(4)), method, budget=budget)
        row: dict[str, Any] = {"row": name, "seconds": time.perf_counter() - started}
        row |= {"bits_per_weight": state.bits_per_weight, "packed_bytes": state.packed_bytes}
        row |= {"low_rank_bits": low_rank_bits(state)}
        found = divergence(apply(program, state).module(), program.module(), windows)
        row |= {"perplexity": found.program.ppl, "original": found.original.ppl, "kl": found.kl_mean}
        row |= {"kl_stderr": found.kl_stderr, "top1": found.top1, "top1_stderr": found.top1_stderr}
        print(row, flush=True)
        path = RESULTS / "moe.json"
        done = {old["row"]: old for old in json.loads(path.read_text())["rows"]} if path.exists() else {}
        save_result("moe", list({**done, name: row}.values()), calibration="64x256 c4_calib.txt")


if __name__ == "__main__":
    main()
