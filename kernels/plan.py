"""Plan the launches of an operator, and their bytes read and written, by running its code on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operands of `lopro::` operators that have one row a token.
ACTIVATIONS = ("x", "latent", "gate", "residual")
# Rows of an activation while a free number of tokens is traced: 0 or 1 would be taken for a size that broadcasts.
_TRACED_ROWS = 7
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


@dataclass(frozen=True)
class Kernel:
    """One launch: bytes that it reads and writes, by operand of the operator, "output" or "intermediate"."""

    name: str
    read: dict[str, int]
    written: dict[str, int]


@dataclass
class _Step:
    """A launch while it is recorded: tensors by address of their storage, and the number of fp32 partial sums."""

    name: str
    read: dict[int, Tensor] = field(default_factory=dict)
    written: dict[int, Tensor] = field(default_factory=dict)
    splits: int = 1


def plan(
    operator: torch._ops.OpOverload, args: Sequence[Any], tokens: int, free: bool, device: torch.device
) -> tuple[Kernel, ...]:
    """Launches of one call of a `lopro::` operator; no device is needed, and nothing is computed.

    A Triton operator is one launch, and one more where partial sums are added up. A gemm of ATen is one launch. ATen
    operators between them count as one launch, "aten", as a compiler fuses them; eager mode launches each alone. A
    launch reads each operand and writes each result once.

    Args:
        operator: such as `torch.ops.lopro.packed_site.default`.
        args: its positional arguments. Of tensors, shape and dtype count; of activations' shapes, the last dimension.
            With the operand "slots", ids are as many a token.
        tokens: rows of the activations.
        free: select kernels as if tracing didn't know the number of tokens; bytes are still counted for `tokens`.
        device: type "cuda" or "cpu".
    """
    # Imported here: it brings sympy, which takes time and memory.
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    rows: int | torch.SymInt = tokens
    if free:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        rows = mode.from_tensor(
            torch.empty(_TRACED_ROWS, device="meta", dtype=torch.float32), symbolic_context=context
        ).shape[0]
    names: dict[int, str] = {}
    slots = next((value for argument, value in zip(operator._schema.arguments, args, strict=False)
                  if argument.name == "slots"), 0)  # fmt: skip
    # Without the Python dispatcher, composite operators would specialise symbolic sizes.
    with torch.no_grad(), mode, enable_python_dispatcher():
        operands: list[Any] = []
        for argument, value in zip(operator._schema.arguments, args, strict=False):
            if isinstance(value, Tensor):
                shape = (rows, value.shape[-1]) if argument.name in ACTIVATIONS else value.shape
                if argument.name == "ids" and slots:
                    shape = (rows * slots,)
                value = torch.empty(shape, dtype=value.dtype, device=device)
                names[_storage(value)] = argument.name
            operands.append(value)
        with _Recorder() as recorder:
            result = operator(*operands)
    names[_storage(result)] = "output"
    steps = _live(recorder.steps, _storage(result))
    return tuple(kernel for step in steps for kernel in _kernels(step, names, tokens))


class _Recorder(TorchDispatchMode):
    """Record every dispatched operator that makes a new tensor; consecutive small ones are one step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, made = (
            {_storage(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
            for tree in ((args, kwargs), result)
        )
        # A view launches nothing.
        if not made.keys() <= read.keys():
            ours = func.namespace == "lopro"
            if ours or func.overloadpacket in _PRODUCTS:
                names = [argument.name for argument in func._schema.arguments]
                splits = args[names.index("splits")] if "splits" in names else 1
                self.steps.append(_Step(func.overloadpacket.__name__, splits=splits))
            elif not self.steps or self.steps[-1].name != "aten":
                self.steps.append(_Step("aten"))
            step = self.steps[-1]
            step.read.update({key: leaf for key, leaf in read.items() if key not in step.written})
            step.written.update(made)
        return result


def _live(steps: list[_Step], result: int) -> list[_Step]:
    """Drop results of "aten" steps that neither a later step nor the caller reads, then steps without results."""
    wanted = {result}
    for step in reversed(steps):
        if step.name == "aten":
            step.written = {key: leaf for key, leaf in step.written.items() if key in wanted}
        wanted |= step.read.keys()
    return [step for step in steps if step.written]


def _kernels(step: _Step, names: dict[int, str], tokens: int) -> list[Kernel]:
    def total(tensors: dict[int, Tensor]) -> dict[str, int]:
        found: dict[str, int] = {}
        for key, tensor in tensors.items():
            name = names.get(key, "intermediate")
            found[name] = found.get(name, 0) + _count(tensor.untyped_storage().nbytes(), tokens)
        return found

    read, written = total(step.read), total(step.written)
    if step.splits == 1:
        return [Kernel(step.name, read, written)]
    parts = {"intermediate": sum(4 * step.splits * _count(tensor.numel(), tokens) for tensor in step.written.values())}
    return [Kernel(step.name, read, parts), Kernel("sum", parts, written)]


def _count(size: int | torch.SymInt, tokens: int) -> int:
    """Evaluate a size whose only free symbol is the number of tokens."""
    if isinstance(size, int):
        return size
    return int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, tokens)))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
