"""Compile the CPU kernel with Inductor's compiler: a shared library for eager mode and an archive for AOTInductor.

Results are cached by a hash of sources, flags, compiler and torch, so a change of any of them builds anew.
"""

from __future__ import annotations

import hashlib
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

_NAME = "lopro_cpu_site"
_FOLDER = Path(__file__).parent
_INCLUDE = Path(torch.__file__).parent / "include"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-w")
# Minimum and maximum as single instructions; the search holds neither NaN nor infinity.
_FAST = ("-ffinite-math-only", "-fno-signed-zeros")
# Source files with the flags of the processors that they are for; the other files run on any.
_PATHS = {
    "avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
    "avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "portable.cpp": (),
    "dispatch.cpp": (),
    "shim.cpp": (),
    "register.cpp": (),
    "../../trellis/encode/encode_avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", *_FAST),
    "../../trellis/encode/encode_avx2.cpp": ("-mavx2", "-mfma", *_FAST),
    "../../trellis/encode/encode_portable.cpp": _FAST,
    "../../trellis/encode/encode.cpp": (),
}
_EAGER_ONLY = "register.cpp"
# Memory that g++ 12 takes for the largest of them.
_COMPILER_BYTES = 1 << 30


def shared_library() -> Path:
    """Path of the library that registers the kernel with torch; built if the cache doesn't hold it.

    Raises: BuildError if there is no compiler, it fails, or the cache can't be written.
    """
    return _built() / f"{_NAME}.so"


def archive() -> Path:
    """Path of the static archive with the C function that AOTInductor's code calls. Raises: as `shared_library`.

    Its name holds the build's key, because Inductor's cache knows a library by its name alone.
    """
    folder = _built()
    return folder / f"lib{folder.name}.a"


@cache
def _built() -> Path:
    compiler = _compiler()
    key = hashlib.sha256()
    # Two compilers of one version, or two builds of one torch, may differ in the libraries that they bring.
    torch_build = torch.__version__, str(torch.version.git_version), str(_INCLUDE)
    for part in (compiler, _version(compiler), *torch_build, sys.platform, *platform.libc_ver(), platform.machine()):
        key.update(part.encode() + b"\0")
    # The flags are in this file.
    folders = {(_FOLDER / source).parent.resolve() for source in _PATHS}
    for file in sorted((*(f for folder in folders for f in folder.glob("*.[ch]*")), Path(__file__))):
        key.update(file.name.encode() + b"\0" + file.read_bytes())
    target = cache_dir() / f"{_NAME}-{key.hexdigest()[:20]}"
    if not (target / f"{_NAME}.so").is_file():
        try:
            # One lock for all builds in the cache: compilers are large, and the second finds what the first has built.
            with locked(target.with_name(f"{_NAME}.lock")):
                if not (target / f"{_NAME}.so").is_file():
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

        def compiled(source: str) -> Path:
            result = Path(scratch) / f"{Path(source).name}.o"
            flags = _PATHS[source] if platform.machine() in ("x86_64", "AMD64") else ()
            command = [*_flags(), *flags, f"-I{_INCLUDE}", "-c", str(_FOLDER / source), "-o", str(result)]
            _run(compiler, *command)
            return result

        with ThreadPoolExecutor(compilers(_COMPILER_BYTES)) as pool:
            objects = dict(zip(_PATHS, pool.map(compiled, _PATHS), strict=True))
        libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
        _run(compiler, *_flags(), "-shared", *map(str, objects.values()), libraries, "-ltorch_cpu", "-lc10",
             "-o", str(folder / f"{_NAME}.so"))  # fmt: skip
        shared = [str(path) for source, path in objects.items() if source != _EAGER_ONLY]
        _run(shutil.which("ar") or "ar", "rcs", str(folder / f"lib{target.name}.a"), *shared)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)


def _flags() -> tuple[str, ...]:
    # Inductor's code links GNU's OpenMP library by name, which torch has loaded: one pool of threads for all.
    return (*_FLAGS, "-fopenmp") if sys.platform == "linux" else _FLAGS


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
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} can't be run ({error}): install g++ or clang++, or set CXX to one") from error
    if done.returncode:
        reason = (done.stderr.strip() or "it gave no reason").splitlines()
        message = next((line for line in reason if "error" in line), reason[-1])
        raise BuildError(f"{command[0]} failed: {message}")
    return done.stdout
