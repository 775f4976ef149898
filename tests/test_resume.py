"""A run that was stopped continues where it was and ends with the bytes of one that was not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lopro_fx
from lopro_fx import LoPRo, QuantState
from lopro_fx.errors import CheckpointError
from lopro_fx.progress import Progress
from tests.programs import decoder, ids

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
    owners = (*state.groups.values(), *state.sites.values())
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
    assert {name: site.row["bits_per_weight"] for name, site in again.sites.items()} == {
        name: site.row["bits_per_weight"] for name, site in whole.sites.items()
    }


def test_a_damaged_group_is_solved_again(whole: QuantState, tmp_path: Path) -> None:
    _calibrate(tmp_path)
    path = tmp_path / "blocks.0.o.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    _same(_calibrate(tmp_path), whole)


@pytest.mark.parametrize("change", ["bits", "batches", "weights"])
def test_another_run_is_refused(change: str, tmp_path: Path) -> None:
    with pytest.raises(_StoppedError):
        _calibrate(tmp_path, progress=_stop_after(1))
    program = copy.deepcopy(decoder()[1])
    if change == "weights":
        program.state_dict["blocks.1.down.weight"].data[0, 0] += 1
    batches = [ids(seed=9)] if change == "batches" else BATCHES
    config = LoPRo(bits=4, group_size=32, rank=2, clip_steps=4) if change == "bits" else CONFIG
    with pytest.raises(
        CheckpointError, match="holds a run with other weights, calibration or settings; delete it or name"
    ):
        lopro_fx.calibrate(program, batches, config, resume=tmp_path)


def test_a_damaged_record_of_the_run_is_named(tmp_path: Path) -> None:
    _calibrate(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run.json can't be read"):
        _calibrate(tmp_path)


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not write .*file"):
        _calibrate(tmp_path / "file")
