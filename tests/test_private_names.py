"""Private names of torch, triton and transformers: every one that the code uses stands here, with who uses it.

A new one breaks with a release of theirs; look for a public one first, then add it.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
_THEIRS = ("torch", "triton", "transformers")
_PUBLIC = ("__version__", "__file__")
# The class of operators, and trees of arguments: their documentation names both.
_EVERYWHERE = ("torch._ops", "torch.utils._pytree")
KNOWN: dict[str, set[str]] = {
    "lopro_fx/huggingface/modules.py": {"torch.Tensor._make_wrapper_subclass"},
    "lopro_fx/store/operators.py": {
        "torch._C",
        "torch._C._dispatch_has_kernel_for_dispatch_key",
        "torch._decomp.decomposition_table",
    },
    "passes/compat.py": {
        "torch._C._aoti",
        "torch._dispatch.python",
        "torch._guards.detect_fake_mode",
        "torch._inductor",
        "torch._inductor.codecache",
        "torch._inductor.config",
        "torch._library.custom_ops",
        "torch._library.triton",
        "torch._subclasses.fake_tensor",
        "torch.export.pt2_archive._package.package_pt2",
        "torch.export.pt2_archive._package_weights.Weights",
    },
    "passes/serde.py": {"torch._export.serde"},
    "kernels/cpu/build.py": {"torch._inductor.cpp_builder"},
    "kernels/plan.py": {
        "torch._dispatch.python",
        "torch._subclasses.FakeTensorMode",
        "torch.utils._python_dispatch.TorchDispatchMode",
    },
}


def _used(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [_dotted(node)]
        else:
            continue
        found |= {_private(name) for name in names if name.partition(".")[0] in _THEIRS}
    return found - {""}


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute of a name; empty for others."""
    if isinstance(node, ast.Name):
        return node.id
    inner = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


def _private(name: str) -> str:
    """The name up to its first private part and the next; empty without one, and for operators."""
    parts = name.split(".")
    if parts[:2] == ["torch", "ops"]:
        return ""
    private = next((index for index, part in enumerate(parts) if part.startswith("_") and part not in _PUBLIC), None)
    found = "" if private is None else ".".join(parts[: private + 2])
    return "" if found.startswith(_EVERYWHERE) else found


def test_private_names_of_others_are_known() -> None:
    found = {}
    for root in ("lopro_fx", "passes", "kernels"):
        for path in sorted((ROOT / root).rglob("*.py")):
            if used := _used(path):
                found[path.relative_to(ROOT).as_posix()] = used
    assert found == KNOWN
