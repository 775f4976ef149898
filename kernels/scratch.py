"""Folders and locks for compilers: paths that need no quotes, and one build at a time."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from lopro_fx.kernels.cache import cache_dir

# Needs no quotes in a shell word, into which Inductor splits its command lines, nor in a list of folders.
_PLAIN = re.compile(r"[A-Za-z0-9_./+=@,-]+")


def is_plain(path: str | Path) -> bool:
    """Whether a path needs no quotes in a compiler's command line."""
    return _PLAIN.fullmatch(str(path)) is not None


def plain_place(*first: Path) -> Path:
    """A writable folder whose path needs no quotes: one of `first`, else a temporary one.

    Raises:
        OSError: there is none.
    """
    places = (*first, Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"), cache_dir(), Path.cwd())
    for place in places:
        if is_plain(place.absolute()) and os.access(place, os.W_OK):
            return place.absolute()
    raise OSError("no temporary folder has a path without spaces or other special characters: set TMPDIR to one")


@contextmanager
def compiler_folder(beside: Path) -> Iterator[Path]:
    """A temporary folder whose path needs no quotes, inside `beside` if possible.

    Compilers write paths into libraries: it is reached by a name that is the same each time, unless two are used at
    once, so that the same input gives the same bytes.

    Raises: as `plain_place`.
    """
    with tempfile.TemporaryDirectory(dir=plain_place(beside), prefix="lopro_fx-") as folder, _link(folder) as link:
        yield link


@contextmanager
def _link(folder: str) -> Iterator[Path]:
    """A lasting name of a folder, in the cache; the folder itself where there can be none, or it is in use."""
    link = cache_dir() / "compiling"
    lock = filelock.FileLock(link.with_suffix(".lock"), timeout=0)
    try:
        if not is_plain(link):
            raise OSError("the name needs quotes")
        link.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, filelock.Timeout, NotImplementedError):
        yield Path(folder)
        return
    try:
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(folder, target_is_directory=True)
        except OSError:
            link = Path(folder)
        yield link
    finally:
        with suppress(OSError):
            if link != Path(folder):
                link.unlink(missing_ok=True)
        lock.release()


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock `file` against other threads and processes; a process that dies releases it.

    Raises:
        OSError: the file can't be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(file)
        lock.acquire()
    except NotImplementedError:  # a file system without locks: work may be done twice, with the same result
        yield
        return
    try:
        yield
    finally:
        lock.release()


def compilers(bytes_each: int) -> int:
    """Number of compilers to run in parallel: `$MAX_JOBS`, or as cores and memory allow; at least 1."""
    if (jobs := os.environ.get("MAX_JOBS", "")).isdecimal():
        return max(1, int(jobs))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _words(Path("/sys/fs/cgroup/cpu.max"))
    if len(quota) == 2 and quota[0].isdecimal():
        cores = min(cores, -(-int(quota[0]) // int(quota[1])))
    free = [int(line.split()[1]) * 1024 for line in _lines(Path("/proc/meminfo")) if line.startswith("MemAvailable")]
    limit, used = (_words(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdecimal():
        free.append(int(limit[0]) - int(used[0]))
    return max(1, min(cores, *(memory // bytes_each for memory in free)))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()
