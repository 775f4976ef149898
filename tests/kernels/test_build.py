"""The CPU kernel is built once, however many ask for it together and wherever the cache lies."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lopro_fx.kernels import scratch
from lopro_fx.kernels.cpu import build, native

# Counts itself, and how many run together, then compiles for real; what is built here need not be fast.
_COMPILER = """#!/bin/sh
case " $* " in *" -c "*)
  echo x >> "{folder}/calls"; echo x > "{folder}/running/$$"; ls "{folder}/running" | wc -l >> "{folder}/together"
  {compiler} "$@" -O0; code=$?; rm "{folder}/running/$$"; exit $code
esac
exec {compiler} "$@"
"""
# Four folders of kernels for three paths, twelve files of weights, C functions and registrations, three shared.
_FILES = 27
_ASK = """
import sys, threading, logging
logging.basicConfig(format="%(message)s")
from lopro_fx.kernels.cpu import native
paths = []
threads = [threading.Thread(target=lambda: paths.append(native.active_path())) for _ in range(int(sys.argv[1]))]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*set(paths), len(paths))
"""

_PATHS = """
import sys, tempfile, torch, lopro_fx
from pathlib import Path
assert " " in torch.__file__ and " " in tempfile.gettempdir()
torch.manual_seed(0)
program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()), (torch.randn(2, 64),))
quantized = lopro_fx.quantize(program, None, lopro_fx.RTN(bits=4, group_size=32))
fast = lopro_fx.optimize(quantized, target="cpu", activations="float")
path = lopro_fx.export_aoti(fast, sys.argv[1]).path
x = torch.randn(2, 64)
torch.testing.assert_close(torch._inductor.aoti_load_package(str(path))(x), fast.module()(x))
"""


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A compiler that counts its calls in files beside it."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs g++")
    (tmp_path / "running").mkdir()
    script = tmp_path / "counting-g++"
    script.write_text(_COMPILER.format(folder=tmp_path, compiler=found))
    script.chmod(0o755)
    return script


def _start(compiler: Path, cache: Path, threads: int = 1, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "CXX": str(compiler), "LOPRO_FX_CACHE": str(cache), **more}
    return subprocess.Popen([sys.executable, "-c", _ASK, str(threads)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def _count(compiler: Path, name: str) -> list[int]:
    return [int(line) if line.isdecimal() else 1 for line in (compiler.parent / name).read_text().split()]


def test_a_build_that_many_ask_for(compiler: Path, tmp_path: Path) -> None:
    """Threads and processes that come together wait for one, where a process that was killed has left its folder. No
    path has to please a command line: the cache's, the package's, that of temporary files and torch's own."""
    cache, temporary, site, target = (
        tmp_path / name for name in ("a 'b' \"c\" $HOME é:;&", "t 'm' $p", "site packages", "o u;t é")
    )
    (cache / ".lopro_cpu-left").mkdir(parents=True)
    temporary.mkdir()
    site.mkdir()
    (site / "torch").symlink_to(Path(torch.__file__).parent)
    places = {"TMPDIR": str(temporary), "PYTHONPATH": str(site), "MAX_JOBS": "2"}
    processes = [_start(compiler, cache, threads=3, **places) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        path, count = out.split()
        assert path != "aten", err
        assert count == "3"
        assert err == ""
    assert len(_count(compiler, "calls")) == _FILES
    assert max(_count(compiler, "together")) <= 2
    assert sorted(path.name for path in cache.iterdir() if path.name.startswith(".")) == []

    environment = {**os.environ, "CXX": str(compiler), "LOPRO_FX_CACHE": str(cache), **places}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, "-c", _PATHS, str(target / "a model.pt2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in target.iterdir()] == ["a model.pt2"]

    # What was damaged later is built again.
    (library,) = cache.glob("lopro_cpu-*/lopro_cpu.so")
    os.truncate(library, library.stat().st_size // 2)
    begun = len(_count(compiler, "calls"))
    again = _start(compiler, cache, **places)
    while len(_count(compiler, "calls")) == begun:
        assert again.poll() is None, again.communicate()
        time.sleep(0.05)
    again.kill()
    again.communicate()


@pytest.mark.parametrize("name", ["lopro_cpu.so", "lib{}.a", "sums.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped bit", "missing"])
def test_a_damaged_build_is_seen(name: str, damage: str, tmp_path: Path) -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler")
    built = build.shared_library().parent
    target = tmp_path / built.name
    shutil.copytree(built, target)
    assert build._whole(target)
    file = target / name.format(built.name)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes({"empty": b"", "cut": data[:-1]}.get(damage, data))
    if damage == "missing":
        file.unlink()
    assert not build._whole(target)


def test_a_builder_that_is_killed_blocks_nobody(compiler: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    slow = tmp_path / "slow"
    slow.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) touch "{tmp_path}/begun"; exec sleep 60;; esac\nexec g++ "$@"\n'
    )
    slow.chmod(0o755)
    first = _start(slow, cache)
    while not (tmp_path / "begun").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = _start(slow, cache, MAX_JOBS="1")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    (tmp_path / "begun").unlink()
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert second.poll() is None, second.communicate()
        assert time.monotonic() < deadline, "the second process still waits"
        time.sleep(0.05)
    second.kill()
    second.communicate()


def test_compilers_are_as_many_as_cores_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert 1 <= scratch.compilers(1) <= cores
    assert scratch.compilers(1 << 60) == 1
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(before)})
            assert scratch.compilers(1) == 1
        finally:
            os.sched_setaffinity(0, before)
    monkeypatch.setenv("MAX_JOBS", "5")
    assert scratch.compilers(1 << 60) == 5


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have one path")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_what_paths_share_runs_on_every_processor() -> None:
    """Templates of the standard library are instantiated by every path, and the linker keeps one copy."""
    if native.library() is None:
        pytest.skip("no C++ compiler")
    library = str(build.shared_library())

    def told(*command: str) -> list[str]:
        return subprocess.run([*command, library], capture_output=True, text=True, check=True).stdout.splitlines()

    merged = {line.split()[-1] for line in told("nm") if line.split()[-2] in "VW"}
    functions: dict[str, list[str]] = {}
    for line in told("objdump", "--disassemble", "--no-show-raw-insn"):
        if header := re.match(r"[0-9a-f]+ <(.*)>:", line):
            functions[header[1]] = []
        elif functions:
            next(reversed(functions.values())).append(line)
    # Instructions of AVX and later begin with v.
    later = {name for name, lines in functions.items() if any(re.search(r":\s+v[a-z]", line) for line in lines)}
    assert later
    assert not later & merged
