"""A run that was stopped continues where it was and ends with the bytes of one that was not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx import LoPRo, QuantState
from lopro_fx.errors import CheckpointError
from lopro_fx.progress import Progress
from tests.programs import WIDTH, decoder, export, ids, rows, seeded

CONFIG = LoPRo(bits=3, group_size=32, rank=2, clip_steps=4)
BATCHES = [ids(seed=1), ids(3, 11, seed=2)]


class _StoppedError(Exception):
    pass


def _stop_after(groups: int) -> Progress:
    """Progress that is called once before the first group and once after each."""
    calls = iter(range(groups + 1))

    def progress(done: int, total: int, label: str) -> None:
        if next(calls, None) == groups:
            raise _StoppedError

    return progress


def _calibrate(folder: Path | None, config: LoPRo = CONFIG, progress: Progress | None = None) -> QuantState:
    return lopro_fx.calibrate(decoder()[1], BATCHES, config, resume=folder, progress=progress)


def _tensors(state: QuantState) -> dict[str, Tensor]:
    owners = (*state.inputs.values(), *state.layers.values())
    return {f"{owner.name}.{key}": tensor for owner in owners for key, tensor in owner.tensors.items()}


def _same(first: QuantState, second: QuantState) -> None:
    a, b = _tensors(first), _tensors(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole() -> QuantState:
    return _calibrate(None)


@pytest.mark.parametrize("groups", [1, 5])
def test_a_stopped_run_continues_to_the_same_bytes(groups: int, whole: QuantState, tmp_path: Path) -> None:
    with pytest.raises(_StoppedError):
        _calibrate(tmp_path, progress=_stop_after(groups))
    finished = sorted(tmp_path.glob("*.safetensors"))
    assert len(finished) == groups
    times = [path.stat().st_mtime_ns for path in finished]
    _same(_calibrate(tmp_path), whole)
    assert [path.stat().st_mtime_ns for path in finished] == times, "finished groups were solved again"
    assert len(list(tmp_path.glob("*.safetensors"))) == 8


def test_a_finished_run_is_read_back(whole: QuantState, tmp_path: Path) -> None:
    _calibrate(tmp_path)
    again = _calibrate(tmp_path)
    _same(again, whole)
    assert {name: site.metrics["bits_per_weight"] for name, site in again.layers.items()} == {
        name: site.metrics["bits_per_weight"] for name, site in whole.layers.items()
    }


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "zeros", "another unit", "another run", "empty", "metadata"])
def test_a_damaged_group_is_solved_again(damage: str, whole: QuantState, tmp_path: Path) -> None:
    _calibrate(tmp_path / "run")
    path = tmp_path / "run" / "blocks.0.o.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flipped bit":
        data[-5] ^= 4
    elif damage == "zeros":
        data[-64:] = bytes(64)
    elif damage == "another unit":
        data = bytearray((tmp_path / "run" / "blocks.1.o.safetensors").read_bytes())
    elif damage == "another run":
        _calibrate(tmp_path / "other", replace(CONFIG, seed=1))
        data = bytearray((tmp_path / "other" / path.name).read_bytes())
    elif damage == "metadata":
        data = data.replace(b"block", b"bl\xffck")
    path.write_bytes({"cut": data[:100], "empty": b""}.get(damage, data))
    assert damage in ("cut", "empty", "metadata") or path.stat().st_size == len(data)
    _same(_calibrate(tmp_path / "run"), whole)


class _Turned(nn.Module):
    """Weights that are the same for every `angle`, `offset` and `shift`, which lie in the graph, in a buffer that is
    not saved and in a constant."""

    def __init__(self, angle: float = 0.5, offset: float = 0.25, shift: float = 0.125) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("offset", torch.full((WIDTH,), offset), persistent=False)
        self.angle, self.shift = angle, shift

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.angle + self.offset + torch.tensor([self.shift])
        with torch.no_grad():
            return self.second(torch.relu(x))


class _Nested(_Turned):
    """`angle` in a nested graph, which stays one."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x) * self.angle
        return self.second(y.to(x.dtype))


@pytest.mark.parametrize(
    "change",
    ["bits", "seed", "batches", "shape", "order", "weights", "graph", "nested graph", "buffer", "constant", "version"],
)
def test_another_run_is_refused(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = _Nested if change == "nested graph" else _Turned
    batches = [rows(2, 3), rows(2, 3, seed=1)]
    changed = {"shape": [batches[0].reshape(3, 2, WIDTH), batches[1]], "order": batches[::-1], "batches": batches[:1]}
    options = {"graph": {"angle": 2.0}, "nested graph": {"angle": 2.0}, "buffer": {"offset": 1.0},
               "constant": {"shift": 1.0}}  # fmt: skip
    config = {"bits": replace(CONFIG, bits=4), "seed": replace(CONFIG, seed=1)}.get(change, CONFIG)

    def program(**values: float) -> ExportedProgram:
        return export(seeded(kind(**values)), rows(2, 3), dynamic=True)

    with pytest.raises(_StoppedError):
        lopro_fx.calibrate(program(), batches, CONFIG, resume=tmp_path, progress=_stop_after(1))
    other = program(**options.get(change, {}))
    if change == "weights":
        other.state_dict["second.weight"].data[0, 0] += 1
    if change == "version":
        monkeypatch.setattr("lopro_fx.store.journal.__version__", "0.0.1")
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path))}.*delete"):
        lopro_fx.calibrate(other, changed.get(change, batches), config, resume=tmp_path)
    monkeypatch.undo()
    lopro_fx.calibrate(program(), batches, CONFIG, resume=tmp_path)


_KILLED = """
import os, sys
import torch
from tests.programs import decoder
import tests.test_resume as test

torch.set_num_threads(1)
decoder(depth=1)  # sizes that were named before
calls = iter(range(4))
test._calibrate(sys.argv[1], progress=lambda *_: next(calls, None) is None and os._exit(9))
"""


def test_a_process_that_was_killed_is_continued_by_another(whole: QuantState, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False, timeout=300).returncode == 9
    finished = sorted(tmp_path.glob("*.safetensors"))
    assert len(finished) >= 3
    times = [path.stat().st_mtime_ns for path in finished]
    _same(_calibrate(tmp_path), whole)
    assert [path.stat().st_mtime_ns for path in finished] == times


def test_a_damaged_record_of_the_run_is_named(tmp_path: Path) -> None:
    _calibrate(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        _calibrate(tmp_path)


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "file"))):
        _calibrate(tmp_path / "file")
