"""Compile the CPU kernels with Inductor's compiler: a shared library for eager mode and an archive for AOTInductor.

Results are cached by a hash of sources, flags, compiler and torch, so a change of any of them builds anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from lopro_fx.kernels.cache import cache_dir
from lopro_fx.kernels.errors import BuildError
from lopro_fx.kernels.scratch import compilers, locked

_NAME = "lopro_cpu"
_ROOT = Path(__file__).parents[1]
_INCLUDES = (Path(torch.__file__).parent / "include", _ROOT)
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-w")
# Paths with the flags of the processors that they are for; every kernel is compiled for each.
# On other machines than x86-64 there is the last alone.
_PATHS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
# Templates of the standard library are of the file alone, so that no path runs the instructions of another (GCC).
_LOCAL = ("-fno-weak",)
# Folders of files that are compiled once, and of kernels: there, kernel.cpp is compiled for each path.
_SHARED = ("cpu", "formats/affine/cpu_experts", "formats/trellis/cpu_experts")
_KERNELS = ("formats/affine/cpu_site", "formats/trellis/cpu", "formats/trellis/encode", "formats/affine/columns")
# SHA-256 of the other files.
_SUMS = "sums.json"
_EAGER_ONLY = "register.cpp"
# Memory that g++ 12 takes for the largest of them.
_COMPILER_BYTES = 1 << 30


def shared_library() -> Path:
    """Path of the library that registers the kernels with torch; built if the cache doesn't hold it.

    Raises: BuildError if there is no compiler, it fails, or the cache can't be written.
    """
    return _built() / f"{_NAME}.so"


def archive() -> Path:
    """Path of the static archive with the C functions that AOTInductor's code calls. Raises: as `shared_library`.

    Its name holds the build's key, because Inductor's cache knows a library by its name alone.
    """
    folder = _built()
    return folder / f"lib{folder.name}.a"


@cache
def _built() -> Path:
    compiler = _compiler()
    key = hashlib.sha256()
    # Two compilers of one version, or two builds of one torch, may differ in the libraries that they bring.
    torch_build = torch.__version__, str(torch.version.git_version), str(_INCLUDES[0])
    for part in (compiler, _version(compiler), *torch_build, sys.platform, *platform.libc_ver(), platform.machine()):
        key.update(part.encode() + b"\0")
    key.update(" ".join(_flags()).encode() + b"\0")
    # The other flags are in this file.
    sources = (file for folder in (*_SHARED, *_KERNELS) for file in sorted((_ROOT / folder).glob("*.*")))
    for file in (*(file for file in sources if file.suffix in (".cpp", ".h")), Path(__file__)):
        key.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    target = cache_dir() / f"{_NAME}-{key.hexdigest()[:20]}"
    if not _whole(target):
        try:
            # One lock for all builds in the cache: compilers are large, and the second finds what the first has built.
            with locked(target.with_name(f"{_NAME}.lock")):
                if not _whole(target):
                    _build(compiler, target)
        except OSError as error:
            raise BuildError(f"{target} can't be written ({error}): set LOPRO_FX_CACHE to a writable folder") from error
    return target


def _build(compiler: str, target: Path) -> None:
    """Build in a folder beside the target and rename it, so that the target is whole or absent."""
    for stale in target.parent.glob(f".{_NAME}-*"):
        # Left by a process that was killed: nobody else builds now.
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{_NAME}-") as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()

        def compiled(job: tuple[int, tuple[str, tuple[str, ...]]]) -> Path:
            number, (source, flags) = job
            result = Path(scratch) / f"{number}.o"
            includes = [f"-I{folder}" for folder in _INCLUDES]
            _run(compiler, *_flags(), *flags, *includes, "-c", str(_ROOT / source), "-o", str(result))
            return result

        jobs = _jobs(_LOCAL if "Free Software Foundation" in _version(compiler) else ())
        with ThreadPoolExecutor(compilers(_COMPILER_BYTES)) as pool:
            objects = list(pool.map(compiled, enumerate(jobs)))
        # The linker takes the first of equal symbols: it has to be one that every processor runs.
        jobs, objects = jobs[::-1], objects[::-1]
        libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
        _run(compiler, *_flags(), "-shared", *map(str, objects), libraries, "-ltorch_cpu", "-lc10",
             "-o", str(folder / f"{_NAME}.so"))  # fmt: skip
        shared = [str(path) for job, path in zip(jobs, objects, strict=True) if not job[0].endswith(_EAGER_ONLY)]
        _run(shutil.which("ar") or "ar", "rcs", str(folder / f"lib{target.name}.a"), *shared)
        sums = {file.name: _sum(file) for file in folder.iterdir()}
        (folder / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
        for file in folder.iterdir():
            with file.open("rb") as open_file:
                os.fsync(open_file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)


def _whole(target: Path) -> bool:
    """Whether a build is as it was written: a damaged library would end every process that loads it."""
    try:
        sums = json.loads((target / _SUMS).read_text(encoding="utf-8"))
        return sums.keys() == {f"{_NAME}.so", f"lib{target.name}.a"} and all(
            _sum(target / name) == known for name, known in sums.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _jobs(local: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Sources and their own flags: those of the latest processors first, which are the largest, and of any last."""
    paths = _PATHS if platform.machine() in ("x86_64", "AMD64") else {"portable": ()}
    large = [(f"{folder}/kernel.cpp", (f"-DLOPRO_PATH={path}", *flags, *local))
             for path, flags in paths.items() for folder in _KERNELS]  # fmt: skip
    small = (file for folder in (*_SHARED, *_KERNELS) for file in sorted((_ROOT / folder).glob("*.cpp")))
    return [*large, *((str(file.relative_to(_ROOT)), ()) for file in small if file.name != "kernel.cpp")]


def _flags() -> tuple[str, ...]:
    # Inductor's code links GNU's OpenMP library by name, which torch has loaded: one pool of threads for all.
    flags = (*_FLAGS, "-fopenmp") if sys.platform == "linux" else _FLAGS
    # Such as "address", for tests of the kernels (CONTRIBUTING.md).
    sanitizer = os.environ.get("LOPRO_FX_SANITIZE")
    return (*flags, f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer", "-g1") if sanitizer else flags


def _compiler() -> str:
    """The compiler that Inductor uses, from a private function of torch."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return get_cpp_compiler()
    except Exception as error:  # Inductor raises its own classes, and they move
        raise BuildError("no C++ compiler was found: install g++ or clang++, or set CXX to one") from error


def _version(compiler: str) -> str:
    return _run(compiler, "--version")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} can't be run ({error}): install g++ or clang++, or set CXX to one") from error
    if done.returncode:
        reason = (done.stderr.strip() or "it gave no reason").splitlines()
        message = next((line for line in reason if "error" in line), reason[-1])
        raise BuildError(f"{command[0]} failed: {message}")
    return done.stdout
