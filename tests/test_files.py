"""What `replacing` does with links, devices, modes and names, and what `require_writable` refuses."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lopro_fx.errors import CheckpointError
from lopro_fx.store.files import replacing, require_writable, write_tensors


def _write(path: Path, text: str = "new") -> None:
    require_writable(path)
    with replacing(path) as temporary:
        temporary.write_text(text)


def _fill(path: Path, text: str = "new") -> None:
    require_writable(path)
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text(text)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("missing", [False, True])
def test_a_link_to_a_file_stays_one(tmp_path: Path, missing: bool) -> None:
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    target.parent.mkdir()
    if not missing:
        target.write_text("old")
    link.symlink_to(target)
    (tmp_path / "second").symlink_to("link")
    _write(tmp_path / "second")
    assert link.is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("missing", [False, True])
def test_a_link_to_a_folder_stays_one(tmp_path: Path, missing: bool) -> None:
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    target.parent.mkdir()
    if not missing:
        target.mkdir()
        (target / "old").write_text("old")
    link.symlink_to(target)
    _fill(link)
    assert link.is_symlink()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_fifo_is_written_through(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_text()))
    reader.start()
    _write(tmp_path / "fifo", "through")
    reader.join(30)
    assert got == ["through"]
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_device_is_written_through(tmp_path: Path) -> None:
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        null.write_text("x")
    except OSError as error:
        pytest.skip(f"a device can't be made here: {error}")
    _write(null)
    assert stat.S_ISCHR(null.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["null"]


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_by_name_goes_where_prints_go(tmp_path: Path, kind: str) -> None:
    """With a position of its own, one of two writers would overwrite the other."""
    # A link of our own as /dev/stdout is: code that replaces links would break the system's.
    own = tmp_path / "stdout"
    own.symlink_to("/proc/self/fd/1")
    names = [str(name) for name in (own, "/proc/self/fd/1") if Path(name).exists()]
    code = (
        "import sys; from pathlib import Path; from lopro_fx.store.files import replacing, require_writable\n"
        "print('before')\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    require_writable(path)\n"
        "    with replacing(path) as temporary: temporary.write_text('written\\n')\n"
        "print('after')"
    )
    with (tmp_path / "out").open("w") as file:
        sink = file if kind == "file" else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code, *names], stdout=sink, text=True, check=True)
    shown = (tmp_path / "out").read_text() if kind == "file" else done.stdout
    assert shown.splitlines() == ["before", *["written" for _ in names], "after"]


def test_every_name_of_a_file_shows_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("a longer old text")
    os.link(tmp_path / "one", tmp_path / "two")
    _write(tmp_path / "one")
    assert (tmp_path / "two").read_text() == "new"
    assert (tmp_path / "one").samefile(tmp_path / "two")


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_new_files_and_folders_have_the_mode_that_the_umask_allows(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "tensors") as temporary:
            write_tensors(temporary, {"a": torch.ones(2)}, {})
        with replacing(tmp_path / "made" / "folder") as temporary:
            temporary.mkdir()
            write_tensors(temporary / "tensors", {"a": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert _mode(tmp_path / "tensors") == _mode(tmp_path / "made/folder/tensors") == 0o666 & ~mask
    assert _mode(tmp_path / "made/folder") == _mode(tmp_path / "made") == 0o777 & ~mask


def test_what_is_replaced_hands_on_its_mode_and_owner(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "folder").mkdir(mode=0o750)
    if os.getuid() == 0:
        os.chown(tmp_path / "file", 65534, 65534)
    owner = (tmp_path / "file").stat().st_uid
    _write(tmp_path / "file")
    _fill(tmp_path / "folder")
    assert (_mode(tmp_path / "file"), _mode(tmp_path / "folder")) == (0o640, 0o750)
    assert (tmp_path / "file").stat().st_uid == owner


@pytest.mark.parametrize("name", ["old", "new", "mode", "a" * 250])
def test_any_name(tmp_path: Path, name: str) -> None:
    for content in ("one", "two"):
        _fill(tmp_path / name, content)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["file"]
        assert (tmp_path / name / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failure_leaves_a_folder_as_it_was(tmp_path: Path) -> None:
    _fill(tmp_path / "folder", "old")
    with (
        pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "folder"))),
        replacing(tmp_path / "folder") as temporary,
    ):
        (temporary / "not made" / "file").touch()
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_loop_of_links_and_a_file_as_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "loop", tmp_path / "file" / "inside", tmp_path / ("a" * 300)):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            require_writable(path)
    if Path("/proc/self").is_dir():
        with pytest.raises(CheckpointError, match=r"/proc/result\.json"):
            require_writable(Path("/proc/result.json"))


# The superuser may write anywhere, so this runs as nobody where the suite runs as the superuser.
_CLOSED = """
import os, sys
from pathlib import Path
from lopro_fx.errors import CheckpointError
from lopro_fx.store.files import replacing, require_writable
root = Path(sys.argv[1])
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
for name in ("file", "link"):
    require_writable(root / name)
    with replacing(root / name) as temporary:
        temporary.write_text(name)
    print((root / "file").read_text())
require_writable(root / "folder")
for _ in range(2):
    with replacing(root / "folder") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("x")
    print([path.name for path in (root / "folder").iterdir()])
for name in ("absent", "closed", "absent/inside"):
    try:
        require_writable(root / name)
    except CheckpointError as error:
        print(str(error).rpartition(": ")[2])
print(sorted(path.name for path in root.iterdir()))
"""


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that other users may enter, which those of pytest's `tmp_path` are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_file_and_a_folder_in_a_folder_that_is_closed_to_us(root: Path) -> None:
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "old").write_text("x")
    for name in ("file", "closed"):
        (root / name).write_text("old")
    (root / "link").symlink_to("file")
    for path, mode in ((root / "file", 0o666), (root / "folder", 0o777), (root / "closed", 0o444), (root, 0o555)):
        path.chmod(mode)
    done = subprocess.run([sys.executable, "-c", _CLOSED, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    denied, names = "Permission denied", ["closed", "file", "folder", "link"]
    assert done.stdout.splitlines() == ["file", "link", "['new']", "['new']", denied, denied, denied, str(names)]
