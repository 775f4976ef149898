"""AOTInductor package: one file that runs with torch, or libtorch, without lopro_fx."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from lopro_fx.errors import CheckpointError, GraphError, first_line
from lopro_fx.kernels.errors import BuildError
from lopro_fx.kernels.scratch import compiler_folder
from lopro_fx.layer import stored_bytes
from lopro_fx.passes import compat
from lopro_fx.passes.calls import format_of, packed_calls
from lopro_fx.passes.mutation import clean_constants
from lopro_fx.passes.record import is_quantised
from lopro_fx.report.report import report
from lopro_fx.store.files import reason_of, replacing, require_writable
from lopro_fx.store.tensors import unique

# Passed to each compilation, never set globally.
_OPTIONS = {
    "aot_inductor.package": True,
    # Small tensors would be written into kernels as literals, and layers that differ in them could share no kernel.
    "always_keep_tensor_constants": True,
    # Debug tables weigh as much as the code.
    "aot_inductor.enable_line_tables": False,
}
_APART = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
}
# Kinds of operators that a format's compiled kernels serve.
_COMPILED = ("cpu", "cpu_experts")
# Allowance for code, alignment and the archive, as a part of the packed bytes.
_OVERHEAD = 0.05
# Messages of compilers and linkers on a full disk, and on a file at its size limit.
_FULL = ("No space left on device", "File too large", "File size limit exceeded")


@dataclass(frozen=True)
class AotiResult:
    """Path of the package, its bytes, their bound (see `size_bound`), and the seconds that it took."""

    path: Path
    bytes: int
    bound: int
    seconds: float


def export_aoti(program: ExportedProgram, path: str | Path) -> AotiResult:
    """Compile a program for the device that its tensors are on and write it as a `.pt2` package.

    The machine code is for the processor that this runs on. Load it with `torch._inductor.aoti_load_package(path)`.

    Args:
        program: quantised or not; it is compiled on its example inputs.
        path: the file to write, ending in `.pt2`; one that exists is replaced when all went well.

    Raises:
        CheckpointError: the name doesn't end in `.pt2`, or the file can't be written (nothing is left half-written).
        GraphError: the program has no example inputs, or AOTInductor can't compile it.
    """
    path = check_name(path)
    warn_of_python([program])
    started = time.monotonic()
    # The compiler leaves files, a second copy of every weight included, which go with the temporary folder.
    with replacing(path) as temporary, compiler_folder(temporary.parent) as folder:
        files = compile_program(program, folder / "build")
        try:
            # The archive holds its own first name.
            compat.write_package(str(folder / "model.pt2"), {"model": files})
            shutil.move(folder / "model.pt2", temporary)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"could not write {path}: {reason_of(error)}; nothing was left of it") from error
    return AotiResult(path, path.stat().st_size, size_bound(program), time.monotonic() - started)


def check_name(path: str | Path) -> Path:
    """Check that a package can be written to the path, before anything is compiled.

    Raises:
        CheckpointError: it doesn't end in `.pt2`, is a folder, or can't be written.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise CheckpointError(f"{path}: the name of an AOTInductor package ends in .pt2")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a package is one file")
    require_writable(path)
    return path


def size_bound(program: ExportedProgram) -> int:
    """Bytes that a package should not exceed: 1.05 * packed bytes + every other tensor, tied ones once.

    Code is a fixed cost of some megabytes, so a model of a few million weights exceeds it.
    """
    tensors = {**program.state_dict, **program.constants}
    total = stored_bytes(tensor for _, tensor in unique(tensors) if isinstance(tensor, torch.Tensor))
    packed = report(program).packed_bytes if is_quantised(program) else 0
    return total + int(_OVERHEAD * packed)


def warn_of_python(programs: Iterable[ExportedProgram]) -> None:
    """Warn of operators that a package can call but not contain; the warning points to the caller's caller."""
    nodes = (node for program in programs for node in program.graph.nodes if compat.needs_python(node.target))
    for target, name in {node.target: node.name for node in nodes}.items():
        # transformers' fallback for experts where torch has no grouped GEMM of the dtype.
        fix = "; a model in bfloat16 does without it" if "grouped_mm" in str(target) else ""
        warnings.warn(
            f"'{name}' calls {target}, which is written in Python: a process that loads the package must import what "
            f"defines it first{fix}",
            stacklevel=3,
        )


def compile_program(
    program: ExportedProgram, folder: Path, *, apart: bool = False, metadata: dict[str, str] | None = None
) -> list[Any]:
    """Compile a program and return AOTInductor's files for a package; `folder` is made for them.

    Args:
        folder: a path that a command line takes, see `compiler_folder`.
        apart: keep the tensors out of the library, so that several programs of a package can share them.
        metadata: strings that the library carries.

    Raises:
        CheckpointError: the disk of the folder is full.
        GraphError: the program has no example inputs, or AOTInductor can't compile it.
    """
    if program.example_inputs is None:
        raise GraphError("the program has no example inputs, which AOTInductor needs; export it again")
    folder.mkdir()
    graph_module = compat.copied(program.graph_module)
    constants = clean_constants(program)
    clean = compat.rebuild(program, graph_module, program.graph_signature, program.state_dict, constants)
    assert clean.example_inputs is not None
    args, kwargs = clean.example_inputs
    options = {**_OPTIONS, **(_APART if apart else {}), "aot_inductor.output_path": str(folder),
               "aot_inductor.metadata": metadata or {}}  # fmt: skip
    try:
        with torch.no_grad(), compat.plain_paths(folder), _kernel_options(clean, folder / "kernel") as kernel:
            files = compat.aot_compile(clean, args, kwargs, {**options, **kernel})
    except GraphError:
        raise
    except BuildError as error:
        called = ", ".join({"lopro::" + format_of(node).operators[kind] for kind in _COMPILED
                            for node in packed_calls(clean.graph, kind)})  # fmt: skip
        raise GraphError(
            f"the program holds {called}, whose kernel can't be built: {error}; or optimise without target='cpu'"
        ) from error
    except Exception as error:  # Inductor and the C++ compiler below it raise anything
        if any(words in str(error) for words in _FULL):
            places = f"the disk of {folder.parent}, or of the compiler's own {tempfile.gettempdir()}, is full"
            raise CheckpointError(f"could not compile: {places}; set TMPDIR to a folder with more space") from error
        raise GraphError(f"AOTInductor can't compile this program: {first_line(error)}") from error
    for source in (Path(file) for file in files if str(file).endswith(".cpp")):
        # The library is compiled; torch 2.11 needs only the source's name, to find the library's description.
        source.write_bytes(b"")
    return files


@contextmanager
def _kernel_options(program: ExportedProgram, folder: Path) -> Iterator[dict[str, Any]]:
    """Options for the formats' compiled kernels, together; each format has a folder of its own inside `folder`."""
    formats = {format.name: format for format in map(format_of, packed_calls(program.graph, *_COMPILED))}
    options: dict[str, Any] = {}
    with ExitStack() as stack:
        for name in sorted(formats):
            (folder / name).mkdir(parents=True)
            for key, value in stack.enter_context(formats[name].inductor_options(folder / name)).items():
                options[key] = _joined(key, options[key], value) if key in options else value
        yield options


def _joined(key: str, first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        return {**first, **second}
    if isinstance(first, list):
        return [*first, *(item for item in second if item not in first)]
    if first != second:
        raise GraphError(f"the formats of the program need different values of Inductor's option '{key}'")
    return first
