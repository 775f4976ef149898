"""`backend_report`: the kernels that each packed layer runs, with their bytes and FLOPs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.errors import ConfigError, GraphError
from lopro_fx.kernels.plan import Kernel, plan
from lopro_fx.passes.calls import EXPERTS, PROJECT, ROTATE, ROUND, format_of, kind_of, out_features
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import group_of, record_of, sites_of
from lopro_fx.report.table import render

_DEVICES = ("cuda", "cpu")
# Kinds of operators that multiply with a packed weight.
_PACKED = ("linear", "site", "cpu", "int8", *EXPERTS, "cpu_experts")


@dataclass(frozen=True)
class BackendReport:
    """Kernels that a quantised program's operators launch, in graph order.

    `rows` is one dict an operator: operator, layers (names of Linears, or of the input that a rotation or projection
    serves), shape, bits, tokens, free, kernels, launches, read and written (bytes by operand, "output" or
    "intermediate", what one launch leaves for another), bytes (all of them), flops and, with a bandwidth, microseconds.
    `str()` draws the table.
    """

    device: str
    tokens: int | None
    bandwidth: float | None
    rows: tuple[dict[str, Any], ...]

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all rows: launches, read, written, bytes, flops and, with a bandwidth, microseconds."""
        sums: dict[str, Any] = {key: sum(row[key] for row in self.rows) for key in ("launches", "bytes", "flops")}
        for key in ("read", "written"):
            sums[key] = sum(sum(row[key].values()) for row in self.rows)
        if self.bandwidth is not None:
            sums["microseconds"] = _microseconds(sums["bytes"], self.bandwidth)
        return sums

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**vars(self), "rows": list(self.rows), "totals": self.totals}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, sort_keys=True)

    def __str__(self) -> str:
        columns = ["operator", "layers", "shape", "bits", "kernels", "launches", "read", "written", "flops"]
        if self.bandwidth is not None:
            columns.append("microseconds")
        shown = [
            {
                **row,
                "layers": ", ".join(row["layers"]),
                "shape": "x".join(map(str, row["shape"])),
                "kernels": ", ".join(row["kernels"]),
                "read": sum(row["read"].values()),
                "written": sum(row["written"].values()),
            }
            for row in self.rows
        ]
        rows = [[row[column] for column in columns] for row in (*shown, {**dict.fromkeys(columns, ""), **self.totals})]
        rows[-1][0] = "total"
        tokens = "tokens as in the program" if self.tokens is None else f"tokens {self.tokens:,}"
        limit = "" if self.bandwidth is None else f", at {self.bandwidth / 1e9:,.0f} GB/s"
        return render(f"{self.device}, {tokens}{limit}", columns, rows)


def backend_report(
    program: ExportedProgram, *, tokens: int | None = 1, device: str = "cuda", bandwidth: float | None = None
) -> BackendReport:
    """List the kernels of each packed Linear of a program, with bytes, FLOPs and the time that memory allows.

    Nothing is run, and the device needn't be present. A rotation or projection that several layers share is one row.
    Bytes are a lower bound: each launch reads each operand and writes each result once. ATen's small operators between
    two GEMMs count as one launch, as compilers fuse them. FLOPs are those of the definition: two for each multiply-add
    of GEMM and low-rank branch, one for each addition of the Hadamard transform. Unpacking and scaling of codes isn't
    counted, nor are a fused operator's norm, activation and residual. Of experts, as many are read as there are pairs
    of token and expert, if those are fewer. A packed embedding moves a row a token and isn't listed.

    Args:
        program: from `quantize`, `apply`, `load` or `optimize`.
        tokens: rows of every activation; a model's last product of experts has one for each pair. Kernels are those of
            eager mode, or of a program exported with that number. None takes each layer's own number from the program.
            Where that is dynamic, kernels are those for an unknown number, as in compiled code, and figures are for one
            token.
        device: "cuda" or "cpu".
        bandwidth: bytes per second for the time at the memory limit, which is left out without one. Vendors' data
            sheets give 4.8e12 for the H200 and 3.35e12 for the H100 SXM.

    Raises:
        ConfigError: a value is out of range.
        GraphError: the program is not quantised, or was decomposed since.
    """
    if tokens is not None and tokens < 1:
        raise ConfigError(f"tokens is {tokens}; give 1 or more, or None for the program's own number")
    if device not in _DEVICES:
        raise ConfigError(f"device is '{device}'; known devices: {', '.join(_DEVICES)}")
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ConfigError(f"bandwidth is {bandwidth}; give bytes per second, more than 0")
    record_of(program, "report")
    before = (ROTATE, PROJECT, ROUND)
    nodes = [node for node in program.graph.nodes if node.target in before or kind_of(node) in _PACKED]
    if not any(kind_of(node) in _PACKED for node in nodes):
        raise GraphError("this program holds no packed Linear; report before it is decomposed")
    plans: dict[Any, tuple[Kernel, ...]] = {}
    rows = tuple(_row(node, tokens, device, bandwidth, plans) for node in nodes)
    return BackendReport(device, tokens, bandwidth, rows)


def _row(
    node: Node, tokens: int | None, device: str, bandwidth: float | None, plans: dict[Any, tuple[Kernel, ...]]
) -> dict[str, Any]:
    call = operands(node)
    # A node stands for the tensor that it makes, without data.
    named = {name: value.meta["val"] if isinstance(value, Node) else value for name, value in call.named.items()}
    own = math.prod(named["x"].shape[:-1])
    free = tokens is None and not isinstance(own, int)
    count = tokens or (1 if free else own)
    # Layers of one shape run the same kernels, and models have hundreds of them.
    key = (node.target, count, free, *[_shape(value) for value in named.values()])
    if key not in plans:
        # ATen's plan is the same on every device; some of its operators look for a GPU even with meta tensors.
        plain = node.target is ROUND or (kind_of(node) is not None and not format_of(node).kernels())
        place = torch.device("cpu" if plain else device)
        plans[key] = plan(call.operator, list(named.values()), count, free, place)
    kernels = plans[key]
    read, written = _merged([kernel.read for kernel in kernels]), _merged([kernel.written for kernel in kernels])
    if "slots" in named:
        _count_routed(read, node, named, count)
    moved = sum(read.values()) + sum(written.values())
    rows = out_features(node) if kind_of(node) in _PACKED else 0
    row = {
        "operator": call.operator.overloadpacket.__name__,
        "layers": list(sites_of(node)) if rows else [group_of(node)],
        "shape": _shape_of(named, rows),
        "bits": named["bits"] if kind_of(node) and "bits" in format_of(node).spec else "",
        "tokens": count,
        "free": free,
        "kernels": [kernel.name for kernel in kernels],
        "launches": len(kernels),
        "read": read,
        "written": written,
        "bytes": moved,
        "flops": _flops(named, rows, count),
    }
    return row if bandwidth is None else {**row, "microseconds": _microseconds(moved, bandwidth)}


def _count_routed(read: dict[str, int], node: Node, named: dict[str, Any], tokens: int) -> None:
    """Count the bytes of as many experts as there are pairs, if those are fewer."""
    for name in {*format_of(node).tensor_names, "core"} & read.keys():
        experts = named[name].shape[0]
        read[name] = read[name] // experts * min(experts, tokens * named["slots"])


def _shape(value: Any) -> Any:
    """Key of an operand in a plan, without dynamic sizes."""
    if not isinstance(value, Tensor):
        return value
    return value.dtype, tuple(size for size in value.shape if isinstance(size, int))


def _shape_of(named: dict[str, Any], rows: int) -> list[int]:
    columns, down = named["x"].shape[-1], named.get("down")
    rows = rows or (0 if down is None else down.shape[0])
    return [rows, columns] if rows else [columns]


def _flops(named: dict[str, Any], rows: int, tokens: int) -> int:
    columns, block = named["x"].shape[-1], named.get("block", 1)
    flops = tokens * (columns - named.get("skip", 0)) * (block.bit_length() - 1)
    pairs = tokens * named.get("slots", 1)
    flops += 2 * pairs * rows * columns
    down, up = named.get("down"), named.get("up")
    if down is not None:
        flops += 2 * tokens * down.numel()
    if up is not None:
        # One factor of all that experts have.
        flops += 2 * pairs * rows * up.shape[-1]
    return flops


def _merged(parts: list[dict[str, int]]) -> dict[str, int]:
    keys = {key: None for part in parts for key in part}
    return {key: sum(part.get(key, 0) for part in parts) for key in keys}


def _microseconds(moved: int, bandwidth: float) -> float:
    return 1e6 * moved / bandwidth
