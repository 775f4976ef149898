from __future__ import annotations

import signal
import subprocess
import sys
import time

from tests.cli.conftest import SMALL


def _start(model_folder, out):
    arguments = ["quantize", str(model_folder), *SMALL, "--rank", "4", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "lopro_fx", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets what it starts in the background ignore Ctrl-C, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509  one thread
    )


def test_interrupted_run_continues_and_ends_in_the_same_bytes(run, model_folder, quantized_folder, tmp_path):
    out, journal = tmp_path / "out", tmp_path / "out.partial"
    # Ctrl-C, and what ends services and batch jobs.
    for sent, code, word in ((signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")):
        before = len(list(journal.glob("model.*.safetensors")))
        process = _start(model_folder, out)
        while len(list(journal.glob("model.*.safetensors"))) == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(sent)
        _, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        # A slow machine gets lines of progress before.
        last = err.splitlines()[-1]
        assert last.startswith(f"lopro-fx: {word}")
        assert str(journal) in last
        assert not out.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in journal.glob("model.*.safetensors")}
    assert 0 < len(finished) < 8, "stopped too late to show anything"

    code, _, err = run("quantize", model_folder, *SMALL, "--rank", "4", "--out", out)
    assert (code, err) == (0, "")
    assert not journal.exists()
    tensors = [(folder / "tensors.safetensors").read_bytes() for folder in (out, quantized_folder)]
    assert tensors[0] == tensors[1]
