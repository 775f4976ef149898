"""Private torch calls of the graph passes, except those of `serde.py`.

Tried on torch 2.11.0, 2.13.0 and 2.15.0. `tests/test_private_names.py` lists every file to change when a name moves.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import mmap
import operator
import os
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._library.custom_ops import OPDEFS
from torch._library.triton import get_triton_kernels_for_op
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule, Node

from lopro_fx.kernels.scratch import is_plain, plain_place, variable

_PROGRAMS, _WEIGHTS = "data/aotinductor/", "data/weights/"
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def rebuild(
    program: ExportedProgram,
    graph_module: GraphModule,
    signature: ExportGraphSignature,
    state_dict: Mapping[str, Any],
    constants: Mapping[str, Any],
) -> ExportedProgram:
    """Build a new, validated program around an edited graph (`ExportedProgram._update`, used by torch's own passes)."""
    with warnings.catch_warnings():
        # torch copies its own deprecated class; users can do nothing about it.
        warnings.filterwarnings("ignore", r".*LeafSpec.*", FutureWarning)
        return program._update(graph_module, signature, state_dict=dict(state_dict), constants=dict(constants))


def deep_copy(graph_module: GraphModule) -> GraphModule:
    """A deep copy without the module that `torch.export.unflatten` leaves in `meta`, whose values can't be copied."""
    stray = graph_module.meta.get("unflattened_module")
    twin = copy.deepcopy(graph_module, {} if stray is None else {id(stray): None})
    twin.meta.pop("unflattened_module", None)
    return twin


def copied(graph_module: GraphModule) -> GraphModule:
    """A deep copy in which every node keeps its name."""
    twin = deep_copy(graph_module)
    # A placeholder that is named like a builtin, such as `input`, is renamed by the copy; the signature goes by names.
    for node, new in zip(graph_module.graph.nodes, twin.graph.nodes, strict=True):
        new.name = node.name
    return twin


def fake_mode(program: ExportedProgram) -> FakeTensorMode:
    """The mode that the program's placeholder values live in; new nodes must use the same one."""
    values = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if "val" in node.meta]
    return detect_fake_mode(values) or FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def propagation(mode: FakeTensorMode) -> Iterator[None]:
    """Run operators on fake tensors as export does: otherwise composite ones would specialise symbolic sizes."""
    with mode, enable_python_dispatcher():
        yield


def fake_input(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Fake twin of a constant, every dimension static."""
    if type(tensor) is not Tensor or tensor.requires_grad or tensor.layout != torch.strided:
        return mode.from_tensor(tensor, static_shapes=True)
    # What `from_tensor` makes of a plain tensor, in an eighth of the time: programs have tens of thousands of them.
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, meta, tensor.device)


def fake_tensors() -> FakeTensorMode:
    """Context in which operators compute shapes and no data, of real tensors too."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no data."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def is_mutable(target: Any) -> bool:
    """Whether an operator writes one of its arguments."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def needs_python(target: Any) -> bool:
    """Whether an operator is written in Python and stays whole in a package, so that a process must define it first.

    Operators made of Triton kernels and those of lopro_fx are compiled into it.
    """
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "lopro":
        return False
    name = target._schema.name
    return name in OPDEFS and not get_triton_kernels_for_op(name)


def written_operands(node: Node) -> list[Node]:
    """Operands that a call writes in place."""
    return [value for argument, value in bound_operands(node) if argument.alias_info and argument.alias_info.is_write]


def viewed_operand(node: Node) -> Node | None:
    """The operand whose storage a call returns, or None if the result is its own."""
    if node.target is operator.getitem:
        views = node.args[0]
        return views if isinstance(views, Node) and viewed_operand(views) is not None else None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    shared = {name for result in node.target._schema.returns if result.alias_info
              for name in result.alias_info.before_set}  # fmt: skip
    for argument, value in bound_operands(node):
        # "*" is what the operand of a list of views (split, unbind) becomes; the list itself is not annotated.
        if argument.alias_info and (
            shared & set(argument.alias_info.before_set) or "*" in argument.alias_info.after_set
        ):
            return value
    return None


def bound_operands(node: Node) -> list[tuple[Any, Node]]:
    """(schema argument, node) for every operand that is a single node."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    values = [*zip(arguments, node.args, strict=False), *((a, node.kwargs[a.name]) for a in arguments
                                                          if a.name in node.kwargs)]  # fmt: skip
    return [(argument, value) for argument, value in values if isinstance(value, Node)]


def aot_compile(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any]
) -> list[Any]:
    """Compile to AOTInductor's files for a package; options unknown to this torch are dropped."""
    from torch import _inductor
    from torch._inductor import config

    known = config.get_config_copy()
    module = program.module(check_guards=False)
    files = _inductor.aot_compile(module, args, kwargs, options={k: v for k, v in options.items() if k in known})
    assert isinstance(files, list)
    return files


def all_nodes(root: GraphModule) -> Iterator[Node]:
    """Nodes of a graph and of those inside it."""
    for module in root.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


@contextmanager
def plain_paths(folder: Path) -> Iterator[None]:
    """Keep paths that need quotes out of Inductor's command lines, which don't quote all of them.

    Temporary files and the cache move if they lie in such a path; torch is reached through a link in `folder`.
    """
    from torch._inductor import codecache
    from torch.utils import cpp_extension

    moved: list[tuple[Any, str, str]] = []
    if not is_plain(tempfile.gettempdir()):
        moved.append((tempfile, "tempdir", str(plain_place())))
    # For precompiled headers; derived from the temporary folder on import.
    if not is_plain(getattr(codecache, "_HEADER_DIR", "plain")):
        headers = plain_place() / f"torchinductor_{os.getuid()}" / "precompiled_headers"
        moved.append((codecache, "_HEADER_DIR", str(headers)))
    if not is_plain(cpp_extension._TORCH_PATH):
        (link := folder / "torch").symlink_to(cpp_extension._TORCH_PATH)
        moved += [(cpp_extension, "_TORCH_PATH", str(link)), (cpp_extension, "TORCH_LIB_PATH", str(link / "lib"))]
    with ExitStack() as stack:
        if not is_plain(os.environ.get(_CACHE, "plain")):
            # A lasting folder: Inductor remembers for the process's life what it has put there.
            stack.enter_context(variable(_CACHE, str(plain_place() / f"torchinductor_{os.getuid()}")))
        for module, name, value in moved:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def write_package(path: str, files: Mapping[str, list[Any]], extra: Mapping[str, str] | None = None) -> None:
    """Write a `.pt2` archive of AOTInductor's files by program, and of text files.

    Weights outside the compiled code are written once however many programs share them, and as plain tensors, which
    C++ can read.
    """
    from torch.export.pt2_archive._package import package_pt2
    from torch.export.pt2_archive._package_weights import Weights

    def plain(file: Any) -> Any:
        if not isinstance(file, Weights):
            return file
        return Weights({name: (tensor.detach(), properties) for name, (tensor, properties) in file.items()})

    package_pt2(
        path, aoti_files={name: [plain(file) for file in listed] for name, listed in files.items()},
        extra_files=dict(extra or {}),
    )  # fmt: skip


class CompiledProgram:
    """One program of a `.pt2` archive. Called with its inputs, lists of tensors among them; returns its only output."""

    def __init__(self, loader: Any, weights: Mapping[str, Tensor]) -> None:
        self._loader = loader
        # The loader refers to the tensors, so they live as long as it does.
        weakref.finalize(self, _empty, list(weights.values()), _nothing_like(weights)).atexit = False

    @property
    def metadata(self) -> dict[str, str]:
        """What `compile_program` was given as metadata, and torch's own, such as AOTI_DEVICE_KEY."""
        return dict(self._loader.get_metadata())

    def __call__(self, *inputs: Tensor | list[Tensor]) -> Tensor:
        flat = [tensor for value in inputs for tensor in (value if isinstance(value, list) else (value,))]
        (output,) = self._loader.boxed_run(flat)
        return output


def load_package(path: str, device_index: int) -> dict[str, CompiledProgram]:
    """Load the compiled programs of a `.pt2` archive by name, with the weights stored beside them.

    torch's own reader, `load_pt2`, does the same, but imports the compiler, which takes more memory than a small model,
    and keeps the weights for ever.

    Raises:
        ValueError, RuntimeError, OSError, and what damaged files raise: the archive is no such package.
    """
    from torch._C._aoti import AOTIModelPackageLoader  # pyright: ignore[reportMissingModuleSource]

    with zipfile.ZipFile(path) as archive:
        # The first folder is the archive's name.
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        named = {name.split("/")[2]: json.loads(archive.read(info)) for name, info in members.items()
                 if name.startswith(_PROGRAMS) and name.endswith("/weights_config.json")}  # fmt: skip
        # Largest first, while memory is emptiest: its bytes are there twice for a moment.
        files = sorted((name for name in members if name.startswith(_WEIGHTS)), key=lambda n: -members[n].file_size)
        # Each file exceeds its tensor by more than the padding to 64 bytes, so this is enough.
        arena = _arena(sum(members[name].file_size for name in files))
        stored = {}
        for name in files:
            tensor = torch.load(io.BytesIO(archive.read(members[name])), weights_only=True)
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} holds no tensor")
            # Places in it count from the start of its storage.
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            if whole.device.type == "cpu":
                whole, arena = _moved(whole, arena)
            stored[name.removeprefix(_WEIGHTS)] = whole
    weights = {name: _views(name, config, stored) for name, config in named.items()}
    programs = {}
    for name, views in weights.items():
        loader = AOTIModelPackageLoader(path, name, True, 1, device_index)
        programs[name] = CompiledProgram(loader, views)
        use_inactive, check_full_update, user_managed = False, True, True
        loader.load_constants(views, use_inactive, check_full_update, user_managed)
    return programs


def _views(name: str, config: Any, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a program, on the memory of the stored ones."""
    views = {}
    for fqn, place in dict(config).items():
        file, shape, stride, offset = place
        numbers = (*shape, *stride, offset)
        if len(shape) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{name}: the place of {fqn} is {place}")
        whole = stored[file]
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 not in shape and last >= whole.numel():
            raise ValueError(f"{name}: {fqn} reaches beyond {file}, which holds {whole.numel()} numbers: {place}")
        # No view to autograd: that would keep the whole alive, see `_empty`.
        views[fqn] = torch.empty(0, dtype=whole.dtype, device=whole.device).set_(
            whole.untyped_storage(), whole.storage_offset() + offset, shape, stride
        )
    return views


def _nothing_like(weights: Mapping[str, Tensor]) -> dict[torch.device, Tensor]:
    return {
        device: torch.empty(0, dtype=torch.uint8, device=device)
        for device in {tensor.device for tensor in weights.values()}
    }


def _empty(tensors: list[Tensor], nothing: Mapping[torch.device, Tensor]) -> None:
    """Take the memory from the tensors: compiled code never deletes its handles of them (seen in torch 2.13).

    By `data`, which no dispatch mode sees: this runs whenever Python collects a program.
    """
    for tensor in tensors:
        tensor.data = nothing[tensor.device]


def _arena(size: int) -> Tensor:
    """uint8 (size,) on huge pages where the system has them. Each token reads all weights, and small pages cost a
    quarter of the bandwidth where this was measured."""
    huge = 1 << 21
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    memory = mmap.mmap(-1, size + 2 * huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    bytes_ = torch.frombuffer(memory, dtype=torch.uint8)
    return bytes_[-bytes_.data_ptr() % huge :][:size]


def _moved(tensor: Tensor, arena: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a tensor of one dimension at the start of the arena, and the rest of the arena."""
    size = tensor.numel() * tensor.element_size()
    copy = arena[:size].view(tensor.dtype).copy_(tensor)
    return copy, arena[size + -size % 64 :]
