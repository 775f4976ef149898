"""Exchange of a folder for a new one in one step, and what a process that died on the way has left.

The new folder is made in a scratch folder beside the old one. Linux exchanges the two at once (renameat2); elsewhere
the old one moves away first. Files of the old folder that aren't ours then move into the new one. A note in the scratch
folder, written before the step, says how to finish it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from lopro_fx.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PREFIX = ".lopro_fx-"
NEW = "new"  # in a scratch folder, holds what is made there under the target's name
_OLD, _NOTE = "old", "note.json"
# Descriptors that lock this process's scratch folders.
_LOCKS: dict[Path, int] = {}
# The call isn't there, or this file system hasn't got it.
_MISSING = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE

# Files of a folder that we wrote, as relative POSIX names; None where all are ours.
Owned = Callable[[Path], "Iterable[str] | None"]


def make_scratch(place: Path | None) -> Path:
    """Make a scratch folder in `place`, by default among temporary files; its name and its lock say whose it is."""
    scratch = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_host()}-{os.getpid()}-", dir=place))
    if (lock := _lock(scratch)) is not None:
        _LOCKS[scratch] = lock
    return scratch


def drop_scratch(scratch: Path) -> None:
    """Delete a scratch folder with all in it."""
    shutil.rmtree(scratch, ignore_errors=True)
    if (lock := _LOCKS.pop(scratch, None)) is not None:
        os.close(lock)


def finish_dead(place: Path) -> None:
    """Finish the exchanges in `place` of processes of this machine that died, and delete their scratch folders."""
    if fcntl is None:
        return
    mine = f"{PREFIX}{_host()}-"
    for scratch in list(place.glob(f"{mine}*")):
        pid = scratch.name.removeprefix(mine).partition("-")[0]
        # Another process may be doing it, or the note be of another version: then it stays.
        with suppress(OSError, ValueError, KeyError, TypeError):
            if not pid.isdecimal() or _lives(int(pid)) or not _is_own(scratch):
                continue
            if (lock := _lock(scratch)) is not None:
                try:
                    _finish(scratch)
                finally:
                    os.close(lock)


def sync(path: Path) -> None:
    """Bring a file, or a folder with all in it, to the disk, so that a rename after it never points to less."""
    for part in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not part.is_symlink() and (part.is_file() or part.is_dir()):
            _sync(part)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, if it may be read."""
    with suppress(PermissionError):
        _sync(folder)


def _sync(path: Path) -> None:
    if fcntl is None:  # folders can't be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _MISSING:  # a file system that keeps nothing
            raise
    finally:
        os.close(descriptor)


def exchange_beside(folder: Path, new: Path, scratch: Path, owned: Owned) -> None:
    """Put `new` in the place of `folder`, which comes back if that fails; files that aren't ours stay."""
    ours = _names(owned(folder))
    _note(scratch, {"inode": new.stat().st_ino, "owned": None if ours is None else sorted(ours)})
    old = new
    if not _exchanged(folder, new):
        old = scratch / _OLD
        os.replace(folder, old)
        try:
            os.replace(new, folder)
        except BaseException:
            os.replace(old, folder)
            raise
    try:
        _keep(old, folder, ours)
    except BaseException as error:
        # The scratch folder will be deleted.
        rest = _free(folder.with_name(f"{folder.name}.old"))
        os.rename(old, rest)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"{folder} was written, but not all that was in it could be moved there ({error.strerror}): see {rest}"
        ) from error


def exchange_inside(folder: Path, new: Path, scratch: Path, owned: Owned) -> None:
    """Replace our files in `folder`, in which `scratch` lies, by those in `new`; all come back if that fails."""
    files, ours = _files(new), _names(owned(folder))
    ours = {name for name in _files(folder) if Path(name).parts[0] != scratch.name} if ours is None else ours
    _note(scratch, {"made": files})
    try:
        for name in ours:
            if (folder / name).is_file() and not (folder / name).is_symlink():
                _move(folder / name, scratch / _OLD / name)
        for name in files:
            if os.path.lexists(folder / name):
                os.rename(folder / name, _free(folder / name))
            _move(new / name, folder / name)
    except BaseException:
        _put_back(scratch, files)
        raise
    # From here on, nothing is put back any more.
    (scratch / _NOTE).unlink()


def _finish(scratch: Path) -> None:
    """Finish or undo what the note says, and delete the scratch folder."""
    try:
        note: dict[str, Any] = json.loads((scratch / _NOTE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none, or half of one: it is synced before the exchange
        note = {}
    if "made" in note:
        _put_back(scratch, note["made"])
    elif note:
        made = _made(scratch)
        moved = scratch / _OLD if (scratch / _OLD).exists() else None
        unused = made is not None and made.stat().st_ino == note["inode"]
        name = made.name if made is not None else note["name"]
        folder, old = scratch.parent / name, moved or (None if unused else made)
        if moved is not None and not folder.exists():
            # Between two renames: the new one was whole.
            os.replace(made if unused and made is not None else moved, folder)
        if old is not None and old.exists():
            _keep(old, folder, None if note["owned"] is None else set(note["owned"]))
    shutil.rmtree(scratch, ignore_errors=True)


def _made(scratch: Path) -> Path | None:
    """What lies in the place of what was made; None if nothing does any more."""
    return next((scratch / NEW).iterdir(), None) if (scratch / NEW).exists() else None


def _note(scratch: Path, note: dict[str, Any]) -> None:
    (name,) = (path.name for path in (scratch / NEW).iterdir())
    (scratch / _NOTE).write_text(json.dumps({"name": name, **note}), encoding="utf-8")
    sync(scratch / _NOTE)


def _keep(old: Path, folder: Path, ours: set[str] | None) -> None:
    """Move what isn't ours from an old folder to the new one, under another name where its own is taken."""
    for name in () if ours is None else list(_foreign(old, ours)):
        _move(old / name, _free(folder / name))


def _names(owned: Iterable[str] | None) -> set[str] | None:
    """The names that lead to files inside of the folder: a list may be a stranger's."""
    if owned is None:
        return None
    return {name for name in owned if not Path(name).is_absolute() and ".." not in Path(name).parts}


def _foreign(folder: Path, ours: set[str], below: str = "") -> Iterator[str]:
    """Names of files, links and folders that hold none of ours."""
    for entry in sorted(os.scandir(folder / below), key=lambda entry: entry.name):
        name = f"{below}{entry.name}"
        # We write no links, and a folder of that name isn't the file.
        if name in ours and entry.is_file(follow_symlinks=False):
            continue
        if entry.is_dir(follow_symlinks=False) and any(own.startswith(f"{name}/") for own in ours):
            yield from _foreign(folder, ours, f"{name}/")
        else:
            yield name


def _free(path: Path) -> Path:
    """Path, or one beside it if there is something: nothing is overwritten."""
    other, number = path, 1
    while os.path.lexists(other):
        other = path.with_name(f"{path.name}.kept{number if number > 1 else ''}")
        number += 1
    if other != path:
        warnings.warn(f"{path} was not written by lopro_fx: it is now {other.name}", stacklevel=2)
    return other


def _put_back(scratch: Path, made: Iterable[str]) -> None:
    """Undo `exchange_inside`: drop what was moved in, and bring back what was moved out."""
    folder, new = scratch.parent, _made(scratch)
    for name in made:
        if new is not None and not (new / name).exists():
            (folder / name).unlink(missing_ok=True)
    for name in _files(scratch / _OLD):
        _move(scratch / _OLD / name, folder / name)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two paths at once; False where that can't be done."""
    call = _renameat2()
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _MISSING:
        return False
    raise OSError(code, os.strerror(code), str(one))


def _lock(scratch: Path) -> int | None:
    """Descriptor that locks a folder until it is closed; None if another process holds the lock.

    A container shares the disk with others, and perhaps the host's name, but not the numbers of processes.
    """
    if fcntl is None:
        return None
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    return descriptor


@cache
def _renameat2() -> Callable[..., int] | None:
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or its library is older than the call
        return None


@cache
def _host() -> str:
    """This machine, in few characters: others may share the disk."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _is_own(scratch: Path) -> bool:
    """Whether it is a folder of this user: a note of another's could name any file."""
    found = scratch.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
