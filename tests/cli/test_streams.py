"""Standard streams that are closed, full, without a reader, or in a narrow encoding: a finished run is not lost."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lopro_fx import progress, streams
from lopro_fx.cli import main
from lopro_fx.commands import output
from lopro_fx.errors import CheckpointError
from tests.cli.conftest import SMALL

_RTN = ("--method", "rtn", "--bits", "4")


def _narrow(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    return stream.buffer


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "+-"), ("latin-1", "±"), ("utf-8", "±")])
def test_tables_in_any_encoding(model_folder, monkeypatch, tmp_path, encoding, sign):
    written = _narrow(monkeypatch, encoding)
    arguments = ("--against", str(model_folder), "--windows", "2", "--seq-len", "16", "--json", str(tmp_path / "f"))
    assert main(["eval", str(model_folder), *arguments]) == 0
    shown = written.getvalue().decode(encoding)
    assert f" {sign} " in shown
    assert f"{json.loads((tmp_path / 'f').read_text())['ppl']:.3f}" in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_generated_text_in_any_encoding(run, model_folder, monkeypatch, encoding):
    prompt = "naïve 東京 \N{GRINNING FACE} →"
    code, expected, _ = run("generate", model_folder, prompt, "--max-new-tokens", "6")
    assert code == 0
    assert expected.startswith(prompt)
    written = _narrow(monkeypatch, encoding)
    assert main(["generate", str(model_folder), prompt, "--max-new-tokens", "6"]) == 0
    assert written.getvalue() == expected.encode(encoding, "backslashreplace")


def test_a_prompt_that_the_locale_could_not_read_is_refused(run, model_folder):
    code, out, err = run("generate", model_folder, os.fsdecode(b"caf\xe9") + "\udcff")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "prompt" in err


def test_closed_stream_of_python(monkeypatch, capsys):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(CheckpointError, match="standard output"):
        output.say("the figures")
    assert capsys.readouterr().err == "the figures\n"
    monkeypatch.setattr(sys, "stderr", stream)
    streams.note("dropped")


def _shell(command, *arguments, **options):
    """A command with redirections of the shell; "$@" is lopro-fx with the arguments."""
    program = [sys.executable, "-m", "lopro_fx", *map(str, arguments)]
    return subprocess.run(["sh", "-c", command, "sh", *program], capture_output=True, text=True, check=False, **options)


def test_redirections(run, model_folder, quantized_folder, tmp_path):
    """Closed descriptors, a full disk, and readers that leave before the end."""
    _, table, _ = run("report", quantized_folder)
    out = tmp_path / "out"
    small = (*SMALL, *_RTN)
    commands = {
        # Where descriptors are free, the files of the result would get their numbers, and what is printed would go in.
        "all closed": ('"$@" >&- 2>&- <&-', "quantize", model_folder, *small, "--out", out, "--json", tmp_path / "j"),
        "closed": ('"$@" >&-', "report", quantized_folder, "--json", tmp_path / "r"),
        "a few bytes": ('"$@" 2>&1 | head -c 5', "report", quantized_folder),
        "nobody": ('("$@"; echo $? >&3) 3>&2 2>&1 | true', "report", quantized_folder),
    }
    if Path("/dev/full").exists():
        commands["full"] = ('"$@" > /dev/full', "report", quantized_folder, "--json", tmp_path / "full")
        commands["errors full"] = ('"$@" 2> /dev/full', "report", "/nonexistent")
    # Most of each is Python's start.
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(commands, pool.map(lambda arguments: _shell(*arguments), commands.values()), strict=True))
    done = results["all closed"]
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads((tmp_path / "j").read_text())["bytes_after"] == sum(f.stat().st_size for f in out.iterdir())
    done = results["closed"]
    assert done.returncode == 0
    assert "relative_loss" in (tmp_path / "r").read_text()
    assert done.stderr == table
    assert results["a few bytes"].stdout == table[:5]
    assert results["nobody"].stderr == "0\n"
    if "full" in results:
        done = results["full"]
        assert done.returncode == 2
        assert table.rstrip() in done.stderr
        assert re.search(r"standard output\b.*\bfull", done.stderr.splitlines()[-1])
        assert (tmp_path / "full").exists()
        assert results["errors full"].returncode == 2


def test_no_file_is_read_or_written_in_the_locale_s_encoding(model_folder, tmp_path):
    """Python names each such call where it is asked to; a tokenizer holds characters that ASCII lacks."""
    environment = {**os.environ, "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONUTF8": "0"}
    code = (
        "import sys, warnings; from pathlib import Path; import lopro_fx; from lopro_fx.cli import main\n"
        "roots = [str(Path(p).resolve()) for m in (lopro_fx, lopro_fx.passes, lopro_fx.kernels) for p in m.__path__]\n"
        "found = []\n"
        "def show(message, category, filename, line, *_):\n"
        "    if category is EncodingWarning and str(Path(filename).resolve()).startswith(tuple(roots)):\n"
        "        found.append(f'{filename}:{line}')\n"
        "from contextlib import nullcontext; from lopro_fx import cli; cli._quiet = lambda debug: nullcontext()\n"
        "warnings.simplefilter('always', EncodingWarning); warnings.showwarning = show\n"
        "model, out = sys.argv[1:]\n"
        f"small = {list(SMALL + _RTN)!r}\n"
        "assert main(['quantize', model, *small, '--out', out, '--json', out + '.json']) == 0\n"
        "assert main(['export', out, '--hf', out + '.hf']) == 0\n"
        "assert main(['report', out]) == 0\n"
        "print(found, file=sys.stderr)"
    )
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code, str(model_folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stderr.decode().splitlines()[-1] == "[]"


def test_lines_of_progress_where_there_is_no_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS", 0.2)
    with progress.reporting("quantise") as update:
        # Nothing is reported yet, and what runs inside has put another stream in the place of standard error.
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        time.sleep(0.5)
        update(1, 4, "layer one")
        time.sleep(0.5)
    count = len(lines := stream.getvalue().splitlines())
    assert 2 <= count <= 8
    assert all(line.startswith("lopro-fx: quantise: ") for line in lines)
    assert "%" not in lines[0]
    assert "25 %" in lines[-1]
    assert "left" in lines[-1]
    assert "layer one" in lines[-1]
    time.sleep(0.3)
    assert len(stream.getvalue().splitlines()) == count, "it went on after the end"
    assert not [thread for thread in threading.enumerate() if "run" in thread.name]


def test_progress_that_nobody_reads_stops_no_work(monkeypatch):
    tried = []

    class Gone(io.StringIO):
        def write(self, text):
            tried.append(text)
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    with progress.reporting("work") as update:
        time.sleep(0.3)
        update(1, 1, "")
    assert tried
