"""How the GPU benchmarks time: CUDA graphs over weights that no cache holds, contenders in turn, medians of events."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import lopro_fx

DEVICE = torch.device("cuda")
# Weights that are read in turn take at least this much, and four times the L2, so that each is cold when it is read.
_COLD_BYTES = 200_000_000
# A replay shorter than this would be timed together with its launch.
_REPLAY_SECONDS = 1e-3
_MOST_CALLS = 512
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute a thing: a call for each copy of its weights, and what the first call should return."""

    name: str
    calls: Sequence[Call]
    expected: Tensor
    tolerance: float = 1e-2
    facts: dict[str, Any] = field(default_factory=dict)

    def error(self) -> float:
        """Relative RMS error of the first call; infinite where a value is not finite."""
        with torch.no_grad():
            got = self.calls[0]()
        if got.shape != self.expected.shape or not torch.isfinite(got).all():
            return math.inf
        wide = self.expected.double()
        return ((got.double() - wide).norm() / wide.norm()).item()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, and the range of the middle four fifths."""

    median: float
    low: float
    high: float


class Replay:
    """A CUDA graph that makes every call in turn, often enough that its own launch doesn't count."""

    def __init__(self, calls: Sequence[Call]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Kernels are compiled and tuned here: nothing may be compiled while a graph is captured.
        with torch.cuda.stream(stream):
            for call in (*calls, *calls):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self._capture(calls, 1)
        seconds = min(self.seconds() for _ in range(3))
        rounds = min(math.ceil(_REPLAY_SECONDS / seconds), _MOST_CALLS // len(calls))
        if rounds > 1:
            self._capture(calls, rounds)
        self.count = max(rounds, 1) * len(calls)

    def _capture(self, calls: Sequence[Call], rounds: int) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(rounds):
                for call in calls:
                    call()

    def record(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Replay between two events; nothing is waited for."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        return start, end

    def seconds(self) -> float:
        """Of one replay."""
        start, end = self.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def measure(contenders: Iterable[Contender], repetitions: int) -> dict[str, Timing]:
    """Time of one call of each contender, all of them replayed in turn."""
    with torch.no_grad():
        replays = {contender.name: Replay(contender.calls) for contender in contenders}
    for replay in replays.values():
        replay.seconds()
    events: dict[str, list[Any]] = {name: [] for name in replays}
    for _ in range(repetitions):
        for name, replay in replays.items():
            events[name].append(replay.record())
    torch.cuda.synchronize()
    return {
        name: timing(start.elapsed_time(end) / 1e3 / replays[name].count for start, end in pairs)
        for name, pairs in events.items()
    }


def timing(seconds: Iterable[float]) -> Timing:
    """Median and range of several times."""
    times = sorted(seconds)
    edge = len(times) // 10
    return Timing(statistics.median(times), times[edge], times[-1 - edge])


def copies_for(size: int) -> int:
    """Copies of `size` bytes that have to be read in turn for each to be cold."""
    cache = getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 64 << 20)
    return max(2, math.ceil(max(_COLD_BYTES, 4 * cache) / size))


def copy_bandwidth(repetitions: int = 50) -> float:
    """Bytes a second that a copy on the device moves, read and written."""
    source = torch.randint(-(1 << 31), 1 << 31, (1 << 28,), dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    contender = Contender("copy", [lambda: target.copy_(source)], source, tolerance=0.0)
    return 2 * source.nbytes / measure([contender], repetitions)["copy"].median


def machine() -> dict[str, Any]:
    """The device as it is now, with its clocks if the driver tells them."""
    properties = torch.cuda.get_device_properties(DEVICE)
    keys = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        state = dict(zip(keys, (value.strip() for value in answer.splitlines()[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        state = {"unreadable": str(error)}
    return {
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "state": state,
    }


def versions() -> dict[str, str]:
    """Of everything that decides how fast a kernel is."""
    return {
        "lopro_fx": lopro_fx.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }


def save(name: str, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Write `<folder>/<name>.json`; called after every case, so that a run that is cut short keeps what it measured."""
    record = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "device": machine(),
        "versions": versions(),
        "settings": settings,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
