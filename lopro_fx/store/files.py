"""Write files and folders so that a reader sees the old one or the whole new one, never half of either."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lopro_fx.errors import CheckpointError, first_line
from lopro_fx.store.exchange import (
    NEW,
    Owned,
    drop_scratch,
    exchange_beside,
    exchange_inside,
    finish_dead,
    make_scratch,
    sync,
    sync_folder,
)

# Errors of renaming a mount point, and of making a file in a folder that isn't writable.
_FIXED = (errno.EBUSY, errno.EXDEV)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def reason_of(error: BaseException) -> str:
    """Say in one line why a file could not be written."""
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error):
        return "the disk is full"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


@contextmanager
def replacing(path: Path, owned: Owned = lambda folder: None) -> Iterator[Path]:  # noqa: ARG005
    """Yield a temporary path; the file or folder there replaces `path` when the block ends without an error.

    What is new is on the disk before it replaces the old. Of a folder that exists by then, what `owned` doesn't name
    stays: files of the user's, also such as appeared meanwhile. One whose name is needed is renamed, with a warning.
    What a process that was killed has left beside `path` is finished or deleted first.

    Links are resolved: a link stays, and its target is replaced. Mode and owner are kept, and new files have the mode
    that the umask allows. A file that can't be exchanged is written through: a device, a FIFO, standard output, a file
    with several hard links or mounted by itself, or one in a folder that isn't writable. A folder that is a mount
    point, or whose parent isn't writable, stays and gets new contents.

    Raises:
        CheckpointError: writing failed; nothing is left at the temporary path, and `path` is as it was unless it was
            being written through.
    """
    scratch: Path | None = None
    try:
        target = _resolved(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        scratch = _scratch(target)
        # In a folder of its own: the user's name for it may be one that is used here.
        (scratch / NEW).mkdir()
        temporary = scratch / NEW / target.name
        yield temporary
        _set_mode(temporary, scratch)
        sync(temporary)
        if temporary.is_dir() and target.is_dir():
            _hand_on(target, temporary)
            (exchange_inside if scratch.parent == target else exchange_beside)(target, temporary, scratch, owned)
        else:
            _exchange_file(target, temporary, scratch)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {path}: {reason_of(error)}; nothing was left half-written") from error
    finally:
        if scratch is not None:
            drop_scratch(scratch)


def require_writable(path: Path) -> None:
    """Refuse, before the work, a path that `replacing` could not write after it.

    Raises:
        CheckpointError: says what is in the way.
    """
    try:
        target = _resolved(path)
        if target.exists() and not target.is_file() and not target.is_dir():
            mode = target.stat().st_mode
            if not stat.S_ISCHR(mode) and not stat.S_ISFIFO(mode):
                raise CheckpointError(f"{path} can't be written: it is a socket or a disk; name a file")
            if not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        # Missing folders are made at the end, in the first one that exists.
        while not target.exists() and not target.parent.exists():
            target = target.parent
        drop_scratch(_scratch(target))
    except OSError as error:
        raise CheckpointError(f"{path} can't be written: {reason_of(error)}") from error


def recover(path: Path) -> None:
    """Finish what processes that were killed have left of `path`, beside it or in it."""
    for place in (path.parent, path):
        if place.is_dir():
            finish_dead(place)


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths stand for one file or folder, which need not exist."""
    return _resolved(one) == _resolved(other)


def _resolved(path: Path) -> Path:
    """Resolve links, except to devices and pipes: a pipe's link in /proc leads nowhere."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path)) if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else path.absolute()


def _scratch(target: Path) -> Path:
    """Make a new folder, on the target's file system where possible."""
    if target.is_dir() and os.path.ismount(target):
        return make_scratch(target)
    if target.exists() and not target.is_file() and not target.is_dir():
        return make_scratch(None)
    try:
        return make_scratch(target.parent)
    except OSError as error:
        if error.errno not in _CLOSED or not os.access(target, os.W_OK):
            raise
        return make_scratch(target if target.is_dir() else None)


def _set_mode(new: Path, scratch: Path) -> None:
    """Give every file the mode that the umask allows: safetensors and `tempfile` don't."""
    # A new file's mode tells the umask; reading the umask itself would set it for all threads.
    (probe := scratch / "mode").touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    for file in new.rglob("*") if new.is_dir() else (new,):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def _hand_on(old: Path, new: Path) -> None:
    """Copy the old one's mode and, where that is allowed, owner to the new one."""
    kept, made = old.stat(), new.stat()
    if (kept.st_uid, kept.st_gid) != (made.st_uid, made.st_gid):
        with suppress(PermissionError):
            os.chown(new, kept.st_uid, kept.st_gid)
    new.chmod(stat.S_IMODE(kept.st_mode))


def _exchange_file(target: Path, new: Path, scratch: Path) -> None:
    if not target.exists():
        os.replace(new, target)
    elif target.is_file() and target.stat().st_nlink == 1 and scratch.parent == target.parent and _own(target) is None:
        _hand_on(target, new)
        try:
            os.replace(new, target)
        except OSError as error:
            if error.errno not in _FIXED:
                raise
            _write_through(target, new)
    else:
        _write_through(target, new)


def _write_through(target: Path, new: Path) -> None:
    stream = _own(target)
    # A second descriptor of standard output's file would have a position of its own.
    with new.open("rb") as source, open(target if stream is None else stream, "wb", closefd=stream is None) as sink:
        shutil.copyfileobj(source, sink)


def _own(target: Path) -> int | None:
    """Return the descriptor of standard output or error if `target` is its file, else None."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError, ValueError, AttributeError):
            if os.path.samestat(os.fstat(descriptor), target.stat()):
                stream.flush()
                return descriptor
    return None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; it refuses contiguous tensors that overlap in memory with a RuntimeError."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
