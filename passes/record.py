"""Metadata that lopro_fx keeps in a program: one record, and a mark on each of its own nodes.

Both are plain dicts in `meta`, which a saved program keeps as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from lopro_fx.kernels.errors import GraphError

META = "lopro_fx"
Note = dict[str, Any]


class _Quantised(TypedDict):
    config: dict[str, Any]
    left: list[tuple[str, str]]
    info: dict[str, Any]
    sites: dict[str, dict[str, Any]]
    groups: dict[str, list[str]]


class Record(_Quantised, total=False):
    """`graph_module.meta[META]`: how a program was quantised, and under "optimized" what passes did to it since."""

    optimized: list[Note]


class Mark(TypedDict, total=False):
    """`node.meta[META]`: the Linear or Linears that a node computes, and their group."""

    site: str
    sites: list[str]
    group: str


def is_quantised(program: ExportedProgram) -> bool:
    """Whether lopro_fx quantised the program."""
    return META in program.graph_module.meta


def require_program(program: object) -> None:
    """Require an ExportedProgram.

    Raises:
        GraphError: it is another object; the message names its class.
    """
    if not isinstance(program, ExportedProgram):
        raise GraphError(
            f"a {type(program).__name__} was given, and an ExportedProgram is needed: torch.export.export makes one"
        )


def record_of(program: ExportedProgram, purpose: str) -> Record:
    """The record of a quantised program; `purpose` is the verb of the error.

    Raises:
        GraphError: the program was not quantised.
    """
    if not is_quantised(program):
        raise GraphError(f"this program was not quantised by lopro_fx; there is nothing to {purpose}")
    return program.graph_module.meta[META]


def add_notes(graph_module: GraphModule, notes: list[Note]) -> None:
    """Append the notes of a pass to the record."""
    record = graph_module.meta.get(META, {})
    graph_module.meta[META] = {**record, "optimized": [*record.get("optimized", ()), *notes]}


def marks_of(program: ExportedProgram) -> dict[str, Mark]:
    """The mark of each node that has one, by the node's name."""
    return {node.name: node.meta[META] for node in program.graph.nodes if META in node.meta}


def restore(program: ExportedProgram, record: Record | None, marks: Mapping[str, Mark]) -> None:
    """Put a stored record and stored marks into a program that was read back."""
    if record is not None:
        program.graph_module.meta[META] = record
    for node in program.graph.nodes:
        if node.name in marks:
            node.meta[META] = marks[node.name]


def sites_of(node: Node) -> list[str]:
    """Names of the Linears that a packed node computes."""
    mark: Mark = node.meta.get(META, {})
    return mark.get("sites") or [mark.get("site", node.name)]


def group_of(node: Node) -> str:
    """Name of the group that a lopro node belongs to."""
    mark: Mark = node.meta.get(META, {})
    return mark.get("group", node.name)
