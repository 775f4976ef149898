"""`report`: what was done to each layer of a quantised program, and what it weighs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from lopro_fx.kernels.formats.registry import FORMATS
from lopro_fx.layer import stored_bytes
from lopro_fx.passes.calls import packed_names
from lopro_fx.passes.record import record_of
from lopro_fx.report.table import render


@dataclass(frozen=True)
class Report:
    """Figures of a quantised program.

    `rows` is one dict a layer: name, format and its numbers, rank, transform, bits_per_weight, relative_loss, damp,
    seconds and, where something fell back, warning. Learned layers have block_error and block_error_before, of their
    block's output, in place of relative_loss. `packed_bytes` counts everything that replaced weights,
    `kept_bytes` the rest of the state dict, tied tensors once. `bits_per_weight` is 8 * packed_bytes / weights.
    """

    config: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    skipped: tuple[tuple[str, str], ...]
    info: dict[str, Any]
    weights: int
    packed_bytes: int
    kept_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.packed_bytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        lists = {"rows": list(self.rows), "skipped": list(self.skipped)}
        return {**vars(self), **lists, "bits_per_weight": self.bits_per_weight}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, sort_keys=True)

    def __str__(self) -> str:
        formats = dict.fromkeys(row["format"] for row in self.rows if "format" in row)
        every = dict.fromkeys(key for format in FORMATS.values() for key in format.spec)
        spec = [key for key in every if any(key in row for row in self.rows)]
        learned = ["block_error"] if any("block_error" in row for row in self.rows) else []
        columns = ("name", *(["format"] if len(formats) > 1 else []), *spec, "rank", "transform", "bits_per_weight",
                   "relative_loss", *learned, "damp", "warning")  # fmt: skip
        rows = [tuple(row.get(column, "") for column in columns) for row in self.rows]
        title = (
            f"{self.config.get('method', 'quantised')}: {len(self.rows)} layers, "
            f"{self.bits_per_weight:.3f} bits per weight, "
            f"{self.packed_bytes:,} bytes packed, {self.kept_bytes:,} bytes kept"
        )
        return render(title, columns, rows)


def report(program: ExportedProgram) -> Report:
    """Report on a program that `quantize`, `apply` or `load` returned.

    Raises:
        GraphError: the program is not quantised.
    """
    record = record_of(program, "report")
    names = packed_names(program)
    state = program.state_dict
    packed = stored_bytes(tensor for name, tensor in state.items() if name in names)
    kept = {_storage(tensor): tensor for name, tensor in state.items() if name not in names}
    rows = tuple({"name": name, **row} for name, row in record["sites"].items())
    return Report(
        config=record["config"],
        rows=rows,
        skipped=tuple((name, reason) for name, reason in record["left"]),
        info=record["info"],
        weights=sum(torch.Size(row["shape"]).numel() for row in rows),
        packed_bytes=packed,
        kept_bytes=stored_bytes(kept.values()),
    )


def _storage(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.untyped_storage().data_ptr(), tuple(tensor.shape)
