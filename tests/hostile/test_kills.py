"""SIGKILL at every call to the file system, and at random times: the target is whole, old or absent, and a rerun ends
with the bytes of a run that nobody killed, without leftovers."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lopro_fx
from lopro_fx.errors import CheckpointError
from lopro_fx.store import exchange
from lopro_fx.store.checkpoint import load, load_state, save, save_state
from lopro_fx.store.files import replacing
from lopro_fx.store.manifest import add_companions, unchanged, written
from tests.deploy.models import LanguageModel, export_lm
from tests.hostile.child import killed

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, kills, and counts its calls")
CONFIG = lopro_fx.RTN(bits=3, group_size=32)
# Files that the user keeps in a folder of ours.
THEIRS = {".git/config": "x", "README.md": "mine"}


@pytest.fixture(scope="module")
def state() -> lopro_fx.QuantState:
    return lopro_fx.calibrate(_program(), None, CONFIG)


def _program():
    return export_lm(LanguageModel(depth=1))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _first(path: Path) -> None:
    with replacing(path, written) as new:
        new.mkdir()
        (new / "lopro_fx.json").write_text('{"format": "lopro_fx checkpoint", "files": {"a": 1}, "companions": {}}')
        (new / "a").write_text("old")


def _check(place: Path, run: Callable[[Path], None], states: list[dict[str, bytes]], theirs: dict[str, str]) -> None:
    """The target is one of `states`, where None is absent; the rerun gives the last, and nothing else is left."""
    target = place / "target"
    found = content(target) if target.is_dir() else {}
    ours = {name: data for name, data in found.items() if name not in theirs}
    assert ours in states
    run(target)
    assert content(target) == {**states[-1], **{name: text.encode() for name, text in theirs.items()}}
    assert [path.name for path in place.iterdir()] == ["target"]


def _each_kill(tmp_path: Path, run: Callable[[Path], None], existing: bool, gap: bool = False, step: int = 1) -> int:
    """Kill `run` before each of its calls; return how many there are. With `gap`, an old folder may be absent."""
    run(tmp_path / "reference")
    expected, theirs = content(tmp_path / "reference"), THEIRS if existing else {}
    at = 0
    while True:
        place = tmp_path / str(at)
        place.mkdir()
        states = [{}, expected]
        if existing:
            _first(place / "target")
            states = [content(place / "target"), *([{}] if gap else []), expected]
            for name, text in theirs.items():
                (place / "target" / name).parent.mkdir(exist_ok=True)
                (place / "target" / name).write_text(text)
        ended = killed(lambda place=place: run(place / "target"), at)
        _check(place, run, states, theirs)
        if ended is not None:
            return ended
        shutil.rmtree(place)
        at += step


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("swap", ["at once", "in two renames"])
def test_every_call_of_a_state_that_is_saved(tmp_path, state, existing, swap, monkeypatch) -> None:
    if swap == "in two renames":
        monkeypatch.setattr(exchange, "_renameat2", lambda: None)
    gap = swap == "in two renames"
    assert _each_kill(tmp_path, lambda folder: save_state(state, folder), existing, gap) > 20


def test_calls_of_a_program_that_is_saved(tmp_path, state) -> None:
    program = lopro_fx.apply(_program(), state)
    assert _each_kill(tmp_path, lambda folder: save(program, folder), existing=True, step=7) > 20


def test_every_call_inside_a_folder_that_stays(tmp_path, state, monkeypatch) -> None:
    """As a mount point does: its files are exchanged one by one, and a rerun begins by putting them back."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "target")
    expected = tmp_path / "reference"
    save_state(state, expected)
    at, ended = 0, None
    while ended is None:
        place = tmp_path / str(at)
        place.mkdir()
        _first(place / "target")
        (place / "target" / "mine").write_text("x")
        ended = killed(lambda place=place: save_state(state, place / "target"), at)
        assert (place / "target" / "mine").read_text() == "x"
        save_state(state, place / "target")
        assert content(place / "target") == {**content(expected), "mine": b"x"}
        at += 1
    assert at > 20


def test_every_call_of_a_file(tmp_path) -> None:
    def write(path: Path) -> None:
        with replacing(path) as new:
            new.write_text("new" * 1000)

    at, ended = 0, None
    while ended is None:
        (tmp_path / "file").write_text("old")
        ended = killed(lambda: write(tmp_path / "file"), at)
        assert (tmp_path / "file").read_text() in ("old", "new" * 1000)
        write(tmp_path / "file")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        at += 1


def test_random_times_of_saving(tmp_path, state) -> None:
    rng, target = random.Random(0), tmp_path / "place" / "target"
    save_state(state, tmp_path / "reference")
    started = time.monotonic()
    save_state(state, target)
    whole = time.monotonic() - started
    (target / "mine").write_text("x")

    def again() -> None:
        while True:
            save_state(state, target)

    for _ in range(100):
        killed(again, after=rng.uniform(0, 3 * whole))
        load_state(target)
        assert (target / "mine").exists() or any(target.parent.rglob("mine"))
    save_state(state, target)
    assert content(target) == {**content(tmp_path / "reference"), "mine": b"x"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_random_times_of_a_run_that_is_resumed(tmp_path) -> None:
    """A run is killed again and again until it ends; its folder has the bytes of one that was not."""
    program, config = _program(), lopro_fx.LoPRo(bits=3, group_size=32, rank=2, clip_steps=2)

    def run(folder: Path, journal: Path) -> None:
        save(lopro_fx.quantize(program, None, config, resume=journal), folder)

    started = time.monotonic()
    run(tmp_path / "reference", tmp_path / "journal")
    whole = time.monotonic() - started
    rng = random.Random(1)
    for number in range(3):
        target, journal = tmp_path / f"{number}" / "target", tmp_path / f"{number}.partial"
        for _ in range(6):
            killed(lambda target=target, journal=journal: run(target, journal), after=rng.uniform(0, whole))
            if target.exists():
                load(target)
        run(target, journal)
        assert content(target) == content(tmp_path / "reference")
        assert [path.name for path in target.parent.iterdir()] == ["target"]
        assert not list(journal.glob(f"{exchange.PREFIX}*"))


def test_a_folder_of_another_process_that_lives_stays(tmp_path, state) -> None:
    scratch = exchange.make_scratch(tmp_path)
    # Of another container, whose processes this one can't see.
    other = tmp_path / f"{scratch.name.rpartition('-')[0].rpartition('-')[0]}-999999999-x"
    other.mkdir()
    lock = os.open(other, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    save_state(state, tmp_path / "target")
    assert scratch.is_dir()
    assert other.is_dir()
    os.close(lock)
    save_state(state, tmp_path / "target")
    assert not other.exists()
    exchange.drop_scratch(scratch)


def test_files_of_the_user_stay(tmp_path, state) -> None:
    save_state(state, tmp_path / "target")
    (tmp_path / "target" / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "target" / "notes" / "deep" / "file").write_text("mine")
    (tmp_path / "target" / "link").symlink_to("nowhere")
    # Under names of ours.
    (tmp_path / "target" / "record.json").unlink()
    (tmp_path / "target" / "record.json").mkdir()
    (tmp_path / "target" / "record.json" / "inner").write_text("mine")
    with pytest.warns(UserWarning, match=r"record\.json was not written by lopro_fx"):
        save_state(state, tmp_path / "target")
    assert (tmp_path / "target" / "record.json.kept" / "inner").read_text() == "mine"
    load_state(tmp_path / "target")
    assert (tmp_path / "target" / "notes" / "deep" / "file").read_text() == "mine"
    assert (tmp_path / "target" / "link").is_symlink()
    other = tmp_path / "other"

    def meanwhile() -> None:
        with replacing(other, written) as new:
            new.mkdir()
            (new / "lopro_fx.json").write_text("new")
            # Appears while the run goes on.
            other.mkdir()
            (other / "lopro_fx.json").write_text("mine")
            (other / "data").write_text("mine")

    with pytest.warns(UserWarning, match=r"is now lopro_fx\.json\.kept"):
        meanwhile()
    assert content(other) == {"lopro_fx.json": b"new", "lopro_fx.json.kept": b"mine", "data": b"mine"}


def test_an_edited_companion_is_kept(tmp_path, state) -> None:
    for text in ("first", "second"):
        with replacing(tmp_path / "target", written) as new:
            save_state(state, new)
            (new / "tokenizer.json").write_text(text)
            add_companions(new)
        assert (tmp_path / "target" / "tokenizer.json").read_text() == text
    (tmp_path / "target" / "tokenizer.json").write_text("edited")
    with (
        pytest.warns(UserWarning, match=r"it is now tokenizer\.json\.kept"),
        replacing(tmp_path / "target", written) as new,
    ):
        save_state(state, new), (new / "tokenizer.json").write_text("third"), add_companions(new)
    assert (tmp_path / "target" / "tokenizer.json.kept").read_text() == "edited"
    assert unchanged(tmp_path, {"../x": "", "/x": "", "a" * 5000: "", "a\0b": ""}) == set()


def test_what_could_not_be_moved_is_not_lost(tmp_path, state, monkeypatch) -> None:
    save_state(state, tmp_path / "target")
    (tmp_path / "target" / "mine").write_text("x")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(exchange, "_move", refuse)
    with pytest.raises(CheckpointError, match=r"target was written, but .*Permission denied.*target\.old"):
        save_state(state, tmp_path / "target")
    assert (tmp_path / "target.old" / "mine").read_text() == "x"
    load_state(tmp_path / "target")


def test_a_scratch_folder_of_another_user_is_left_alone(tmp_path, state) -> None:
    if os.geteuid() != 0:
        pytest.skip("only the superuser can make a folder of another user")
    made = exchange.make_scratch(tmp_path)
    stranger = tmp_path / f"{made.name.rpartition('-')[0].rpartition('-')[0]}-999999999-x"
    exchange.drop_scratch(made)
    (stranger / "new" / "x").mkdir(parents=True)
    (tmp_path / "victim").write_text("mine")
    (stranger / "note.json").write_text('{"name": "x", "made": ["victim"]}')
    os.chown(stranger, 65534, 65534)
    save_state(state, tmp_path / "target")
    assert (tmp_path / "victim").read_text() == "mine"
    assert stranger.exists()


def test_a_folder_with_the_name_of_a_journal_is_refused(tmp_path) -> None:
    (tmp_path / "X.partial").mkdir()
    (tmp_path / "X.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not written by lopro_fx"):
        lopro_fx.calibrate(_program(), None, CONFIG, resume=tmp_path / "X.partial")
    assert (tmp_path / "X.partial" / "thesis.txt").read_text() == "mine"
