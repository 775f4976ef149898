"""A process that serves one engine, and the handle by which another process drives it.

Each side of a comparison lives in a process of its own, so that both can be warm at once and their repetitions can
alternate. They talk in lines of JSON. Standard library only (and NumPy through the engines): an interpreter without
torch runs it too.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

_STATUS = Path("/proc/self/status")


class Engine(Protocol):
    """What is measured. Both return the next token's logits: a NumPy array (V,) float32, valid until the next call."""

    def prefill(self, ids: list[int]) -> Any:
        """Forgets what came before and reads the prompt in one pass."""

    def decode(self, token: int) -> Any:
        """Appends one token."""


def serve(engine: Engine, **info: Any) -> None:
    """Answers requests from standard input until it closes; `info` is the answer to the task `info`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        task = request.pop("task")
        answer = {**info, "peak_rss_bytes": peak_rss()} if task == "info" else _TASKS[task](engine, **request)
        print(json.dumps(answer), file=answers, flush=True)


def peak_rss() -> int:
    """Bytes that this program has had resident at most. `ru_maxrss` can also hold the peak of the process that started
    it, so Linux's own figure of the address space goes first."""
    if _STATUS.exists():
        return int(_STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Child:
    """A process that runs `serve`; started on construction, ended on leaving the `with` block."""

    def __init__(self, command: list[str], threads: int, folder: Path) -> None:
        self._command = " ".join(command)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def ask(self, task: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin
        print(json.dumps({"task": task, **request}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._command} ended with status {self._process.wait()}: see its output above")
        return json.loads(line)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _decode(engine: Engine, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Seconds of `tokens` greedy steps after the prompt, which is not timed."""
    token = int(engine.prefill(prompt).argmax())
    chosen = [token]
    started = time.perf_counter()
    for _ in range(tokens):
        token = int(engine.decode(token).argmax())
        chosen.append(token)
    return {"seconds": time.perf_counter() - started, "tokens": chosen}


def _prefill(engine: Engine, prompt: list[int]) -> dict[str, Any]:
    started = time.perf_counter()
    token = int(engine.prefill(prompt).argmax())
    return {"seconds": time.perf_counter() - started, "tokens": [token]}


def _logits(engine: Engine, prompt: list[int]) -> dict[str, Any]:
    return {"logits": engine.prefill(prompt).tolist()}


_TASKS = {"decode": _decode, "prefill": _prefill, "logits": _logits}
