"""Imports go one way: kernels, layer.py, passes, then the rooms of lopro_fx; no two of them import each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FOLDERS = {"lopro_fx": "lopro_fx", "lopro_fx.passes": "passes", "lopro_fx.kernels": "kernels"}


def _modules() -> dict[str, Path]:
    return {
        ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for package, folder in _FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def _graph() -> dict[str, set[str]]:
    """Module to the modules that it imports, anywhere in its code."""
    modules, graph = _modules(), {}
    for module, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= names & modules.keys() or {node.module}
        graph[module] = (found & modules.keys()) - {module}
    return graph


def _room(module: str) -> str:
    """Folder of a module in lopro_fx; the module itself if it lies in none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else module


def test_no_modules_import_each_other() -> None:
    assert len(list(TopologicalSorter(_graph()).static_order())) > 150


def test_no_rooms_import_each_other() -> None:
    rooms: dict[str, set[str]] = {}
    for module, imported in _graph().items():
        rooms.setdefault(_room(module), set()).update({_room(name) for name in imported} - {_room(module)})
    order = list(TopologicalSorter(rooms).static_order())
    assert order.index("kernels") < order.index("lopro_fx.layer") < order.index("passes") < order.index("lopro_fx")
