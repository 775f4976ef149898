"""All causal and masked language models of the installed transformers, tiny and random: what works with each.

Every architecture runs in a process of its own with a time limit, so that a crash is a row of the table. To try another
checkout, run its Python from a folder that holds a copy of these files as `benchmarks/`.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections import Counter, deque
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import torch

from benchmarks.common import RESULTS, save_result
from benchmarks.family_checks import COLUMNS, check
from benchmarks.family_models import architectures


def _child(architecture: str, pipe: Any, limit: int) -> None:
    os.setsid()  # what it starts, such as a compiler, ends with it
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    check(architecture, lambda column, status: pipe.send((column, status)))
    pipe.send(("done", ""))
    pipe.close()


_PATIENCE = 8  # times the limit that it may take where other processes are busy
_OVER = ("SIGXCPU", "SIGKILL")


class _Job:
    """One architecture in a process of its own."""

    def __init__(self, context: Any, architecture: str, limit: int) -> None:
        self.row: dict[str, Any] = {"architecture": architecture}
        self._pipe, theirs = context.Pipe(duplex=False)
        self._started, self._limit = time.monotonic(), _PATIENCE * limit
        self._process = context.Process(target=_child, args=(architecture, theirs, limit))
        self._process.start()
        theirs.close()

    def finished(self) -> bool:
        """Read what the process sent; end it where its time is over."""
        alive = self._process.is_alive()
        try:
            while self._pipe.poll():
                column, status = self._pipe.recv()
                self.row[column] = status
        except EOFError:
            pass
        seconds = time.monotonic() - self._started
        if alive and seconds < self._limit:
            return False
        if alive and self._process.pid:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        if self.row.pop("done", None) is None:
            code = self._process.exitcode or 0
            ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.row[self.row.get("step", "exports")] = f"crash: {'its time was over' if ended in _OVER else ended}"
        self.row.pop("step", None)
        self.row["seconds"] = round(seconds, 1)
        return True


def _run(names: list[str], limit: int, processes: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("fork")
    waiting, running, rows = deque(names), [], []
    while waiting or running:
        while waiting and len(running) < processes:
            running.append(_Job(context, waiting.popleft(), limit))
        for job in [job for job in running if job.finished()]:
            running.remove(job)
            rows.append(job.row)
            print(_line(job.row), flush=True)
        time.sleep(0.05)
    return sorted(rows, key=lambda row: names.index(row["architecture"]))


def kind_of(status: str | None) -> str:
    """The first word or two of a status."""
    return "-" if status is None else status.partition(":")[0]


def _line(row: dict[str, Any]) -> str:
    cells = "  ".join(f"{kind_of(row.get(column)):13}" for column in COLUMNS)
    reasons = dict.fromkeys(f"{column}: {row[column]}" for column in COLUMNS if row.get(column, "ok") != "ok")
    return f"{row['architecture']:34}{row['seconds']:6.1f}  {cells}" + "".join(f"\n    {text}" for text in reasons)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="`kind:type` as in the table; all by default")
    parser.add_argument("--limit", type=int, default=120, help="seconds of CPU time for one architecture")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the rows of `names` go, as JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = args.names or architectures()
    print(f"{'architecture':34}{'s':>6}  " + "  ".join(f"{column:13}" for column in COLUMNS))
    check("causal:llama", lambda *_: None)  # what every process would import and compile for itself
    rows = _run(names, args.limit, args.processes)
    counts = {column: dict(Counter(kind_of(row.get(column)) for row in rows)) for column in COLUMNS}
    print(json.dumps(counts, indent=1))
    if args.out:
        args.out.write_text(json.dumps({"counts": counts, "rows": rows}, indent=1) + "\n")
    if not args.names:
        save_result("families", rows, counts=counts, limit=args.limit)
        print(Path(RESULTS) / "families.json")


if __name__ == "__main__":
    main()
