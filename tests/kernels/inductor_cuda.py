"""What Inductor makes of packed sites on an H100 that isn't there.

`-m tests.kernels.inductor_cuda PROGRAM TOKENS BITS`, where PROGRAM is one of `PROGRAMS`, prints JSON: kernels in
the order in which the program launches them. Inductor generates code from shapes alone, so a device of which only
the properties are known is enough to see which kernels it writes and to compile each of them. A process of its own,
because Inductor remembers what it was told of the device.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, graph
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses import FakeTensorMode, fake_tensor
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

import lopro_fx  # noqa: F401  registers the operators
from benchmarks.ahead import _resources

K, N, RANK, BLOCK, GROUP = 8192, 28672, 16, 256, 128
_H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, gcnArchName="",
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, total_memory=80 << 30,
)  # fmt: skip


class _Generated(Exception):
    """Ends a compilation that has got as far as it can without a device."""


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def pretend() -> None:
    """Let this process believe in an H100 as long as nothing is computed."""
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": _H100,
        "get_device_capability": (9, 0), "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "_lazy_init": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "_get_device_properties": _H100,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    interface = {"is_available": True, "current_device": 0, "get_compute_capability": 90, "is_triton_capable": True,
                 "raise_if_triton_unavailable": None, "get_device_properties": _H100}  # fmt: skip
    for name, answer in interface.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer: answer))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: _H100)  # type: ignore[assignment]
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)  # type: ignore[assignment]
    fake_tensor.init_gpu_context = lambda _device: None
    triton_helpers.set_driver_to_gpu = lambda: None
    triton.runtime.driver.set_active(_Driver())


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _site(k: int, n: int, bits: int) -> tuple[Any, ...]:
    """Operands of `lopro::packed_site` after the activation, without data."""
    groups = k // GROUP
    return (
        None, _empty(k // 8, dtype=torch.uint8), BLOCK, 0, _empty(RANK, k, dtype=torch.int8),
        _empty(RANK, dtype=torch.float16), _empty(n, k * bits // 32, dtype=torch.int32),
        _empty(n, groups, dtype=torch.float16), _empty(n * groups * bits // 32, dtype=torch.int32), None,
        _empty(n, RANK, dtype=torch.int8), _empty(RANK, dtype=torch.float16), bits, GROUP,
    )  # fmt: skip


def site(tokens: int, bits: int) -> tuple[Callable[..., Tensor], list[Any]]:
    """relu(site(2 x) + residual), and its arguments."""

    def program(x: Tensor, residual: Tensor, *operands: Any) -> Tensor:
        return torch.relu(torch.ops.lopro.packed_site(2 * x, *operands) + residual)

    return program, [_empty(tokens, K), _empty(tokens, N), *_site(K, N, bits)]


def feed_forward(tokens: int, bits: int) -> tuple[Callable[..., Tensor], list[Any]]:
    """relu(x + down(silu(gate(y)) * up(y))) of x = 2 h and its RMS norm y, gate and up merged, and its arguments."""
    first, second = _site(K, 2 * N, bits), _site(N, K, bits)

    def program(h: Tensor, norm: Tensor, *operands: Any) -> Tensor:
        x = 2 * h
        y = torch.ops.lopro.packed_site(x, *operands[: len(first)], norm, 1e-5)
        gate, up = y.split(N, -1)
        y = torch.ops.lopro.packed_site(up, *operands[len(first) :], gate=gate, activation="silu", residual=x)
        return torch.relu(y)

    return program, [_empty(tokens, K), _empty(K), *first, *second]


def experts(tokens: int, bits: int) -> tuple[Callable[..., Tensor], list[Any]]:
    """A layer of 16 experts, of which a token has four, with branches in a grid; and its arguments."""
    count, slots, k, n, rank = 16, 4, 512, 256, 8

    def operands(columns: int, rows: int) -> tuple[Any, ...]:
        groups = columns // GROUP
        return (
            None, _empty(columns // 8, dtype=torch.uint8), 128, 0, _empty(4 * rank, columns, dtype=torch.int8),
            _empty(4 * rank, dtype=torch.float16), _empty(count, rows, columns * bits // 32, dtype=torch.int32),
            _empty(count, rows, groups, dtype=torch.float16),
            _empty(count, rows * groups * bits // 32, dtype=torch.int32), _empty(4, rows, rank, dtype=torch.int8),
            _empty(4, rank, dtype=torch.float16), _empty(count, 2, dtype=torch.int32),
            _empty(count, rank, rank, dtype=torch.float16), bits, GROUP,
        )  # fmt: skip

    first, second = operands(k, 2 * n), operands(n, k)

    def program(x: Tensor, ids: Tensor, scores: Tensor, *operands: Any) -> Tensor:
        y = torch.ops.lopro.packed_experts_site(2 * x, ids, slots, *operands[: len(first)])
        gate, up = y.chunk(2, -1)
        y = torch.ops.lopro.packed_experts_site(up, ids, 1, *operands[len(first) :], gate, "silu")
        return (y * scores).view(-1, slots, k).sum(1)

    pairs = tokens * slots
    return program, [_empty(tokens, k), _empty(pairs, dtype=torch.int64), _empty(pairs, 1), *first, *second]


PROGRAMS = {"site": site, "feed_forward": feed_forward, "experts": experts}


def generate(name: str, tokens: int, bits: int) -> str:
    """Inductor's code for a program."""
    generated: list[str] = []

    def stop(lowering: graph.GraphLowering) -> None:
        code = lowering.codegen()[0]
        generated.append(getattr(code, "value", code))
        raise _Generated

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        stack.enter_context(inductor_config.patch(fx_graph_cache=False, compile_threads=1))
        stack.enter_context(mock.patch.object(graph.GraphLowering, "_compile_to_module", stop))
        program, arguments = PROGRAMS[name](tokens, bits)
        inputs = [value for value in arguments if isinstance(value, Tensor)]

        def of_tensors(*tensors: Tensor) -> tuple[Tensor]:
            values = iter(tensors)
            return (program(*(next(values) if isinstance(value, Tensor) else value for value in arguments)),)

        traced = make_fx(dispatch_functionalize(of_tensors), decomposition_table=select_decomp_table())(*inputs)
        try:
            compile_fx.compile_fx_inner(traced, inputs)
        except Exception:
            if not generated:
                raise
    return generated[0]


def compile_kernel(name: str, source: str) -> dict[str, Any]:
    """Compile one kernel of a generated program as Inductor would, and tell what it takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        compiled: list[Any] = []
        compile_for_real = triton.compile

        def keep(*args: Any, **options: Any) -> None:
            compiled.append(compile_for_real(*args, **options))
            raise _Generated

        kernel = getattr(module, name)
        with mock.patch.object(triton_heuristics.triton, "compile", keep), suppress(_Generated):
            kernel._precompile_config(kernel.configs[0])
    binary = compiled[0]
    taken = _resources(name, binary.asm["cubin"], binary.metadata.shared)
    return {"name": name, "warps": binary.metadata.num_warps, "spill_bytes": taken.spill_bytes,
            "stores": source.count("tl.store(")}  # fmt: skip


def main() -> None:
    pretend()
    code = generate(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sources = dict(re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL | re.MULTILINE))
    names = dict(re.findall(r"^(\w+) = async_compile\.triton\('(\w+)'", code, re.MULTILINE))
    launched = re.findall(r"^\s+(\w+)\.run\(|extern_kernels\.(\w+)\(", code, re.MULTILINE)
    kernels = [compile_kernel(names[ours], sources[ours].replace("\\\\", "\\")) if ours in names else {"name": theirs}
               for ours, theirs in launched]  # fmt: skip
    sys.stdout.write(json.dumps(kernels) + "\n")


if __name__ == "__main__":
    main()
