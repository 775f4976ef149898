"""Compile the Triton launches of an operator for a GPU that isn't there, and read what they cost.

Registers, spills and shared memory decide whether a kernel can reach the memory limit, and are known without a device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One kernel launch that an operator's Python function asked for."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers of a thread, bytes of spilled registers, bytes of shared memory.

    `instructions` counts all by name, `loop` those of the longest loop, which is where a kernel spends its time.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    loop: int


def record(function: Callable[..., Any], module: Any, *args: Any) -> list[Launch]:
    """Launches of `function(*args)`, the plain Python function of a `triton_op` defined in `module`; none is run."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: launches.append(Launch(self.kernel, grid, args, options))

    with mock.patch.object(module, "wrap_triton", Recorder):
        function(*args)
    return launches


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile for `sm_<capability>`; raises whatever Triton or ptxas raises."""
    kernel = launch.kernel
    names = kernel.arg_names
    values = {**dict(zip(names, launch.args, strict=False)), **launch.options}
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    options = {key: values[key] for key in ("num_warps", "num_stages") if key in values}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _resources(kernel.__name__, compiled.asm["cubin"], compiled.metadata.shared)


def _resources(name: str, cubin: bytes, shared: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    local = re.search(r"LOCAL:(\d+)", usage)
    if registers is None or stack is None or local is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {name}: {usage}")
    opcodes, loop = _instructions(code)
    return Resources(name, int(registers[1]), int(stack[1]) + int(local[1]), shared, opcodes, loop)


def _instructions(disassembly: str) -> tuple[dict[str, int], int]:
    """Instructions by name, and how many lie between the two ends of the longest jump backwards."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loop = 0
    for line in re.sub(r"/\*.*?\*/", "", disassembly).splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)[ .;](.*)", line):
            names.append(instruction[1])
            target = re.search(r"\.L_\w+", instruction[2]) if instruction[1] == "BRA" else None
            # What follows the last instruction jumps to itself.
            if target and labels.get(target[0], len(names)) < len(names) - 1:
                loop = max(loop, len(names) - labels[target[0]])
    return dict(Counter(names)), loop


def _run(tool: str, *args: str) -> str:
    return subprocess.run([_TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout
