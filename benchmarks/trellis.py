"""What each choice of the trellis format is worth: loss and time on the Linears of one layer, and speed of the search.

Layer 17 of SmolLM2-135M, on unquantised inputs of the calibration of benchmarks/accuracy.py, weighed by gradient. Loss:
tr(E H Eᵀ) / tr(W H Wᵀ) of LoPRo without a branch, for q/k/v together, o, gate/up together, down. Each row changes one
setting of the first. Time is the processor time of a whole solution, one thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import DATA, save_result
from benchmarks.vector import VectorQuantizer
from lopro_fx import RTN, LoPRo, calibrate
from lopro_fx.evaluation.text import read_text, token_windows
from lopro_fx.kernels.cpu.native import PATHS, forced
from lopro_fx.kernels.formats.quantizer import Quantizer
from lopro_fx.kernels.formats.trellis import quantizer as trellis
from lopro_fx.kernels.formats.trellis.quantizer import TrellisQuantizer, TrellisRounder
from lopro_fx.methods.base import Context, Solved, Unit
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.rounding import Rounding
from lopro_fx.models.export import export_causal_lm
from lopro_fx.models.load import load_model

_LAYER = "model.layers.17.*"
_SPEED_ROWS, _SPEED_COLUMNS = 512, 8
_SEEN: list[tuple[list[Tensor], Statistics]] = []


class _Recorder(RTN):
    """Keeps what it is asked to solve in `_SEEN`."""

    def solve(self, unit: Unit, seen: Statistics, context: Context) -> Solved:
        _SEEN.append((list(unit.weights), seen))
        return super().solve(unit, seen, context)


class _EqualRows(TrellisRounder):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._importance = torch.ones_like(self._importance)


def _spread(bits: float, value: float) -> AbstractContextManager[Any]:
    return mock.patch.dict(trellis._SPREAD, {bits: value})


def _columns(bits: float, value: int) -> AbstractContextManager[Any]:
    return mock.patch.dict(trellis._COLUMNS, {bits: value})


_UNFITTED = mock.patch.object(TrellisQuantizer, "refine", Quantizer.refine)
_EQUAL = mock.patch.object(trellis, "TrellisRounder", _EqualRows)
_VECTORS = {bits: mock.patch.object(Rounding, "quantizer", VectorQuantizer(bits=bits)) for bits in (2, 3)}
# Name, settings of LoPRo, and what is changed besides.
CASES: Sequence[tuple[str, dict[str, Any], Sequence[AbstractContextManager[Any]]]] = (
    ("3 bits, window 14, strips of 512", {}, ()),
    ("window 12", {"window": 12}, ()),
    ("window 13", {"window": 13}, ()),
    ("window 15", {"window": 15}, ()),
    ("window 16", {"window": 16}, ()),
    ("strips of 64", {"strip": 64}, ()),
    ("strips of 128", {"strip": 128}, ()),
    ("strips of 256", {"strip": 256}, ()),
    ("one strip", {"strip": -1}, ()),
    ("rows count the same", {}, (_EQUAL,)),
    ("scales not fitted", {}, (_UNFITTED,)),
    ("code spread 1.0", {}, (_spread(3, 1.0),)),
    ("code spread 1.05", {}, (_spread(3, 1.05),)),
    ("code spread 1.15", {}, (_spread(3, 1.15),)),
    ("damping 0.001", {"damp": 0.001}, ()),
    ("damping 0.03", {"damp": 0.03}, ()),
    ("1.5 bits, pairs of columns", {"bits": 1.5}, ()),
    ("2 bits, single columns", {"bits": 2}, ()),
    ("2 bits, pairs of columns", {"bits": 2}, (_columns(2, 2),)),
    ("2.5 bits, pairs of columns", {"bits": 2.5}, ()),
    ("4 bits, single columns", {"bits": 4}, ()),
    ("vector codebooks of LoPRo_v, 2 bits (2.17 to 2.22 bits per weight)", {}, (_VECTORS[2],)),
    ("vector codebooks of LoPRo_v, 3 bits (3.04 to 3.05 bits per weight)", {}, (_VECTORS[3],)),
    ("affine, 3 bits g64 (3.30 bits per weight)", {"format": "affine"}, ()),
    ("affine, 3 bits g32 (3.59 bits per weight)", {"format": "affine", "group_size": 32}, ()),
)


def losses(units: list[tuple[list[Tensor], Statistics]], config: LoPRo) -> tuple[list[float], float]:
    """Relative loss of each unit, and seconds of processor time for all."""
    started = time.process_time()
    found = [config.solution(weights, seen, torch.Generator().manual_seed(0)).relative for weights, seen in units]
    return found, time.process_time() - started


def speed(bits: int, window: int) -> float:
    """Weights of one strip that the search rounds in a second of processor time."""
    weight = torch.randn(_SPEED_ROWS, _SPEED_COLUMNS, generator=torch.Generator().manual_seed(0))
    quantizer = TrellisQuantizer(bits=bits, window=window)
    quantizer.nearest(weight[:, :1], (_SPEED_ROWS,))
    started = time.process_time()
    quantizer.nearest(weight, (_SPEED_ROWS,))
    return weight.numel() / (time.process_time() - started)


def main() -> None:
    torch.set_num_threads(1)
    loaded = load_model("smollm2-135m", torch.float32)
    calibration = token_windows(loaded.tokenizer, read_text(DATA / "c4_calib.txt"), 512, 32)
    recorder = _Recorder(bits=8, clip_steps=0, importance="gradient", include=(_LAYER,))
    calibrate(export_causal_lm(loaded.model), list(calibration.split(1)), recorder)
    units = [(weights, seen) for weights, seen in _SEEN if seen.tokens]
    rows: list[dict[str, Any]] = []
    for name, settings, changes in CASES:
        chosen = {"format": "trellis", "rank": 0, "importance": "gradient", "asymmetry": 0, **settings}
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            found, seconds = losses(units, LoPRo(**chosen))
        rows.append({"case": name, "losses": found, "seconds": seconds})
        print(name, *(f"{loss:.5f}" for loss in found), f"{seconds:.0f} s", flush=True)
    for path in PATHS:
        with forced(path) as there:
            if there:
                rows += [{"search": path, "bits": bits, "window": window, "weights_per_second": speed(bits, window)}
                         for bits in (2, 3, 4) for window in (12, 14, 16)]  # fmt: skip
    save_result("trellis", rows, layer=_LAYER, calibration="32x512 c4_calib.txt")


if __name__ == "__main__":
    main()
