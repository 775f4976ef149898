"""Where the command line writes: links, devices, folders that are refused before the work, failures after it."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lopro_fx
from lopro_fx.commands import quantize, target
from lopro_fx.models import load_model
from lopro_fx.selection import select
from lopro_fx.store.manifest import MANIFEST
from tests.cli.conftest import SMALL
from tests.programs import decoder

_RTN = (*SMALL, "--method", "rtn", "--bits", "4")


@pytest.fixture
def no_model(monkeypatch):
    """A run that gets as far as the model fails."""

    def load(*_):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(quantize, "load_model", load)


def _refused(result, *words):
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for word in words:
        assert word in err


def test_links_and_devices_stay_what_they_are(run, model_folder, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "json").symlink_to(there / "figures.json")
    (tmp_path / "out").symlink_to(there / "folder")
    arguments = ("quantize", model_folder, *_RTN, "--out", tmp_path / "out")
    code, _, err = run(*arguments, "--json", tmp_path / "json")
    assert (code, err) == (0, "")
    assert (tmp_path / "json").is_symlink()
    assert (tmp_path / "out").is_symlink()
    assert json.loads((there / "figures.json").read_text())["bytes_after"] > 0
    assert (there / "folder" / MANIFEST).is_file()
    assert sorted(path.name for path in there.iterdir()) == ["figures.json", "folder"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (there / "folder").iterdir()}
    before = os.umask(0)
    os.umask(before)
    assert set(modes.values()) == {0o666 & ~before}, modes
    os.mkfifo(tmp_path / "fifo")
    got = []
    reader = threading.Thread(target=lambda: got.append(json.loads((tmp_path / "fifo").read_text())))
    reader.start()
    code, _, err = run("report", tmp_path / "out", "--json", tmp_path / "fifo")
    reader.join(30)
    assert (code, err) == (0, "")
    assert got[0]["packed_bytes"] > 0
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_what_can_not_be_written_is_refused_before_the_work(run, no_model, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "missing" / "file")
    paths = [tmp_path, tmp_path / "missing" / "json", tmp_path / "file" / "json", tmp_path / "dangling"]
    if Path("/proc/self").is_dir():
        paths.append(Path("/proc/json"))
    for path in paths:
        _refused(run("quantize", "model", "--json", path), "--json", str(path))
    for path in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/self/out")):
        _refused(run("quantize", "model", "--out", path), str(path))
    _refused(run("quantize", "model", "--out", tmp_path / "x", "--json", tmp_path / "x"), "--json", "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_packages_and_folders_for_transformers_are_refused_before_the_work(run, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.pt2").mkdir()
    for option in ("--package", "--aoti"):
        _refused(run("export", "/nonexistent", option, tmp_path / "folder.pt2"), str(tmp_path / "folder.pt2"))
        _refused(run("export", "/nonexistent", option, tmp_path / "file" / "x.pt2"), str(tmp_path / "file"))
    _refused(run("export", "/nonexistent", "--hf", tmp_path / "file"), str(tmp_path / "file"))


@pytest.mark.parametrize("size", ["banana", "", "5XB", "nan", "infGB", "0", "-5GB", "0.1"])
def test_sizes_that_are_none_are_refused_before_the_work(run, size):
    _refused(run("export", "/nonexistent", "--hf", "x", f"--max-shard-size={size}"), "max_shard_size", "5GB")


@pytest.mark.parametrize(
    "option", ["--temperature=nan", "--temperature=inf", "--temperature=-1", "--top-p=nan", "--top-k=-1",
               f"--seed={1 << 70}"]
)  # fmt: skip
def test_numbers_out_of_range_are_refused_before_the_model_is_read(run, option):
    _refused(run("generate", "/nonexistent", "x", option), option.partition("=")[0][2:].replace("-", "_"))


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1", "x"])
def test_bandwidth_is_a_number_above_0(run, value):
    _refused(run("report", "/nonexistent", "--backend", "cpu", f"--bandwidth={value}"), "--bandwidth", value)


def test_figures_are_printed_where_files_fail_at_the_end(run, model_folder, monkeypatch, tmp_path):
    """The folder goes away while the work runs."""
    (tmp_path / "gone").mkdir()
    costs = target.costs

    def meanwhile(started):
        (tmp_path / "gone").rename(tmp_path / "elsewhere")
        (tmp_path / "gone").write_text("a file")
        monkeypatch.setattr(target, "costs", costs)
        return costs(started)

    monkeypatch.setattr(target, "costs", meanwhile)
    code, out, err = run("quantize", model_folder, *_RTN, "--json", tmp_path / "gone" / "json")
    assert code == 2
    assert "perplexity after" in out
    assert err.count("\n") == 1
    assert str(tmp_path / "gone") in err


def test_texts_that_are_short_or_the_same_are_named(run, model_folder, tmp_path):
    words = [f"word{index} is number {index * 7919 % 1000}." for index in range(300)]
    (tmp_path / "text").write_text(" ".join(words))
    tokenizer, short = load_model(str(model_folder), torch.float32).tokenizer, "Another text"
    while len(tokenizer(short)["input_ids"]) < 70:
        short += " of few words"
    (tmp_path / "short").write_text(short)
    base = ("quantize", model_folder, "--method", "rtn", "--seq-len", "32", "--calib-samples", "4",
            "--eval-windows", "3")  # fmt: skip
    code, _, err = run(*base, "--calib", tmp_path / "text", "--eval", tmp_path / "text")
    assert code == 0
    assert "3 of 3 evaluation windows" in err
    code, _, err = run(*base, "--calib", tmp_path / "text", "--eval", tmp_path / "short")
    assert code == 0
    assert re.search(r"short\b.* 2 windows of 32 tokens\b.*\b3\b", err)
    assert " of 2 evaluation windows" not in err


def test_sizes_are_in_the_last_lines(run, model_folder, tmp_path):
    code, out, err = run("quantize", model_folder, *_RTN, "--out", tmp_path / "out", "--json", tmp_path / "json")
    assert (code, err) == (0, "")
    before, after = (sum(f.stat().st_size for f in folder.iterdir()) for folder in (model_folder, tmp_path / "out"))
    last = [line.split()[:3] for line in out.splitlines() if line.strip()][-2:]
    assert last == [["files", "before", f"{before:,}"], ["files", "after", f"{after:,}"]]
    figures = json.loads((tmp_path / "json").read_text())
    assert (figures["bytes_before"], figures["bytes_after"]) == (before, after)
    assert (figures["dtype"], figures["config"]["head_bits"]) == ("float32", 8)


@pytest.mark.parametrize("text", ["not JSON", "\x08\x00header"])
def test_json_never_replaces_what_is_none(run, model_folder, tmp_path, text) -> None:
    other = tmp_path / "model.safetensors"
    other.write_text(text)
    code, _, err = run("report", model_folder, "--json", other)
    assert code == 2
    assert str(other) in err
    assert other.read_text() == text


def test_json_is_not_put_in_the_place_of_the_journal(run, model_folder, tmp_path) -> None:
    code, _, err = run("quantize", model_folder, "--out", tmp_path / "out", "--json", tmp_path / "out.partial")
    assert code == 2
    assert "out.partial" in err


def test_space_that_is_asked_for_holds_the_folder(monkeypatch, tmp_path) -> None:
    _, program = decoder()
    config = lopro_fx.RTN(bits=4, group_size=32)
    out = target.Target(tmp_path / "q")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(lopro_fx.CheckpointError, match="are free") as refused:
        out.require_space(program, select(program, config), config)
    needed = int(re.search(r"([\d,]+) bytes are needed", str(refused.value))[1].replace(",", ""))
    lopro_fx.save(lopro_fx.quantize(program, None, config), tmp_path / "q")
    assert sum(file.stat().st_size for file in (tmp_path / "q").iterdir()) <= needed
