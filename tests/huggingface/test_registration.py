"""`import lopro_fx` makes transformers know the format, whichever is imported first, and imports nothing itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lopro_fx.huggingface.hook import when_imported

LOAD = "from transformers import AutoModelForCausalLM as A; print(A.from_pretrained(FOLDER).model.layers[0].mlp)"


def _python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_lopro_fx_first_imports_no_transformers(tied_folder):
    code = f"import lopro_fx, sys; assert 'transformers' not in sys.modules; FOLDER = {str(tied_folder)!r}; {LOAD}"
    assert "up_proj): PackedLinear" in _python(code)


def test_transformers_first(tied_folder):
    code = f"import transformers.quantizers.auto, lopro_fx; FOLDER = {str(tied_folder)!r}; {LOAD}"
    assert "up_proj): PackedLinear" in _python(code)


def test_action_runs_once_after_the_import(tmp_path, monkeypatch):
    (tmp_path / "imported_by_test.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    when_imported("imported_by_test", lambda: seen.append(sys.modules["imported_by_test"].value))
    finders = len(sys.meta_path)
    assert not seen
    import imported_by_test  # pyright: ignore[reportMissingImports]

    assert imported_by_test.__spec__.name == "imported_by_test"
    assert seen == [1]
    assert len(sys.meta_path) == finders - 1
    when_imported("imported_by_test", lambda: seen.append(2))
    assert seen == [1, 2]


def test_module_that_is_absent_stays_so():
    when_imported("no_such_module_of_anyone", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        import no_such_module_of_anyone  # noqa: F401  # pyright: ignore[reportMissingImports]
