"""Examples and the code in CONTRIBUTING.md run as they stand, each in a process and folder of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# A line of output of each example, as a pattern; a number that it holds is at most `limit`.
PRINTED = {
    "any_program.py": (r"relative error (\S+)", 0.2),
    "custom_format.py": (r"relative error (\S+)", 0.4),
    "custom_pass.py": (r"site \['2'\] reads clamp_\w+", None),
    "serve_package.py": (r"same as eager: True", None),
    "transformers_folder.py": (r"relative error (\S+)", 0.15),
    "two_programs_one_state.py": (r"largest difference between the two programs (\S+)", 1e-5),
}
DOWNLOADS = {"quantize_and_compile.py"}


def _run(script: Path, folder: Path) -> str:
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _blocks() -> list[tuple[str, str]]:
    """Section and code of each piece of Python in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [
        (section.splitlines()[0], code)
        for section in text.split("\n## ")[1:]
        for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    ]


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_run(name: str, tmp_path: Path) -> None:
    if name in DOWNLOADS:
        pytest.skip("it downloads a model")
    pattern, limit = PRINTED[name]
    printed = _run(EXAMPLES / name, tmp_path)
    found = re.search(f"^{pattern}$", printed, re.MULTILINE)
    assert found is not None, printed
    if limit is not None:
        assert float(found[1]) <= limit


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_are_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize(("section", "code"), _blocks(), ids=lambda value: value if "\n" not in value else "")
def test_code_of_contributing_runs(section: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    _run(tmp_path / "block.py", tmp_path)


def test_contributing_shows_each_extension() -> None:
    assert [section for section, _ in _blocks()] == ["A format", "A method", "A pass", "An operator"]
