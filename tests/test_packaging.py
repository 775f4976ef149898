"""What installs under which name, and that the folders at the top of the tree do no harm when Python starts there."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import lopro_fx

ROOT = Path(__file__).resolve().parents[1]


def _python(code: str, cwd: Path) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_top_level_names_do_nothing_on_import():
    code = (
        "import sys, kernels, passes; from pathlib import Path\n"
        "print(Path(kernels.__file__).parent, Path(passes.__file__).parent)\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'lopro_fx')])\n"
        "print([name for name in sys.modules if name.startswith(('kernels.', 'passes.'))])"
    )
    assert _python(code, ROOT).splitlines() == [f"{ROOT / 'kernels'} {ROOT / 'passes'}", "[]", "[]"]


def test_operators_are_registered_by_lopro_fx_alone():
    code = (
        "import torch, kernels, passes\n"
        "def ours(): return [n for n in torch._C._dispatch_get_all_op_names() if n.startswith('lopro::')]\n"
        "print(len(ours()))\n"
        "import lopro_fx\n"
        "print(len(ours()) > 0)"
    )
    assert _python(code, ROOT).splitlines() == ["0", "True"]


def test_folders_are_installed_inside_the_package(tmp_path):
    code = (
        "import lopro_fx, lopro_fx.kernels, lopro_fx.passes; from importlib.util import find_spec\n"
        "for m in (lopro_fx, lopro_fx.kernels, lopro_fx.passes): print(m.__name__, m.__path__[0])\n"
        "print(find_spec('kernels'), find_spec('passes'))"
    )
    *modules, foreign = _python(code, tmp_path).splitlines()
    assert [line.split()[0] for line in modules] == ["lopro_fx", "lopro_fx.kernels", "lopro_fx.passes"]
    for line, folder in zip(modules, ("lopro_fx", "kernels", "passes"), strict=True):
        installed = Path(line.split()[1])
        assert installed == ROOT / folder or installed.is_relative_to(Path(sys.prefix))
    assert str(ROOT) not in foreign


@pytest.mark.parametrize("root", ["lopro_fx", "passes", "kernels"])
def test_every_folder_with_code_is_a_package(root):
    """setup.py finds packages by their `__init__.py`; a folder without one would be left out of the wheel."""
    folders = {path.parent for path in (ROOT / root).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("root", ["lopro_fx", "passes", "kernels"])
def test_every_data_file_is_packed(root):
    text = (ROOT / "pyproject.toml").read_text()
    line = re.search(r'^"\*" = \[(.*)\]$', text, re.MULTILINE)
    assert line is not None
    packed = {Path(pattern).suffix or pattern for pattern in re.findall(r'"([^"]+)"', line[1])} | {".py"}
    files = [path for path in (ROOT / root).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert [path for path in files if (path.suffix or path.name) not in packed and path.name not in packed] == []


def test_metadata():
    assert metadata.version("lopro_fx") == lopro_fx.__version__
    scripts = {entry.name: entry.value for entry in metadata.entry_points(group="console_scripts")}
    assert scripts["lopro-fx"] == "lopro_fx.cli:main"


def test_every_requirement_is_pinned():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {re.split("==", pin)[0].lower() for pin in pins}
    marker = r"python_version (<|>=) \"3\.11\"|platform_system == \"Linux\""
    assert all(re.fullmatch(rf"[\w-]+==[\w.]+(; ({marker}))?", pin) for pin in pins)
    required = {re.split(r"[\[<>=; ]", text)[0].lower() for text in metadata.requires("lopro_fx") or []}
    assert required - {"lopro_fx", "lopro-fx"} <= pinned


def test_type_checker_finds_the_folders():
    for name in ("passes", "kernels"):
        assert (ROOT / ".typing" / "lopro_fx" / name).resolve() == ROOT / name
