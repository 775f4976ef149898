"""Damaged and hostile files of every kind: a clear error, or the same result; no crash, hang or gigabyte.

An accident changes bytes and leaves the sums that were written. A stranger makes the sums agree with what was changed,
and may so give other weights, but nothing that crashes.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lopro_fx
from lopro_fx.store.checkpoint import load, load_state, save, save_state
from lopro_fx.store.manifest import MANIFEST, sha256
from tests.deploy.models import LanguageModel, export_lm
from tests.hostile.child import outcome
from tests.hostile.mutate import ACCIDENTS, Mutator, change_json, change_tensors, mutant

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and limits a child's memory")
CONFIG = lopro_fx.LoPRo(bits=3, group_size=32, rank=2, clip_steps=2, sweeps=0, refits=0)
IDS = torch.arange(12).view(2, 6)
# Errors of transformers about files that it doesn't find, and of a configuration before ours is read.
_THEIRS = (
    "no file named", "quant_method", "pre_quantized", "attribute 'to_dict'", "decoding a JSON", "not a valid JSON",
    "ignore_mismatched_sizes", "unhashable type",
)  # fmt: skip


def _program():
    torch.manual_seed(0)
    return export_lm(LanguageModel(depth=1))


def _run(program: Any) -> Any:
    # Operators refuse sizes that don't fit with errors of their own.
    try:
        return program.module()(IDS).flatten().tolist()
    except Exception as error:
        return type(error).__name__


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good")
    program = _program()
    state = lopro_fx.calibrate(program, None, CONFIG, resume=place / "journal")
    save(lopro_fx.apply(program, state), place / "program")
    save_state(state, place / "state")
    return place


def resealed(mutate: Mutator) -> Mutator:
    """The damage, with the manifest's sums made to agree."""

    def hostile(rng: random.Random, path: Path) -> None:
        mutate(rng, path)
        manifest = path.with_name(MANIFEST)
        if manifest.exists() and path != manifest and path.is_file():
            content = json.loads(manifest.read_text(encoding="utf-8"))
            content["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            manifest.write_text(json.dumps(content), encoding="utf-8")

    return hostile


def _hostile(name: str) -> list[Mutator]:
    return [resealed(change_tensors if name.endswith("safetensors") else change_json), resealed(ACCIDENTS[0])]


def attack(
    source: Path, place: Path, read: Callable[[Path], Any], mutators: Sequence[Mutator] | None, count: int, seed: int,
    files: Sequence[str] = (),
) -> Counter[str]:  # fmt: skip
    """Read `count` mutants of the folder `source` in children, by default of each of its files in turn.

    Args:
        mutators: what damages them; None for what a stranger does.

    Returns:
        How many ended in what.
    """
    expected = outcome(lambda: read(source))
    assert expected.kind == "value", expected
    rng, seen, failures = random.Random(seed), Counter(), []
    files = files or sorted(path.name for path in source.iterdir() if path.is_file())
    for number in range(count):
        file = files[number % len(files)]
        own = mutators or _hostile(file)
        mutate = own[number // len(files) % len(own)]
        folder = mutant(source, place, file, mutate, rng.randrange(1 << 30))
        found = outcome(lambda folder=folder: read(folder))
        same = found == expected
        refused = found.kind == "refused" or (found.kind == "raw" and any(text in found.what for text in _THEIRS))
        seen["refused" if refused else "same" if same else found.kind] += 1
        if not refused and not same and not (mutators is not ACCIDENTS and found.kind == "value"):
            failures.append((number, file, getattr(mutate, "__name__", "bytes"), found))
        if found.kind == "refused" and "\n" in found.what.strip():
            failures.append((number, file, "an error of several lines", found.what))
    assert not failures, "\n".join(map(str, failures[:20]))
    assert seen["refused"] > count // 4, seen
    return seen


@pytest.mark.parametrize("hostile", [False, True])
def test_programs(folders: Path, tmp_path: Path, hostile: bool) -> None:
    attack(
        folders / "program",
        tmp_path / "mutant",
        lambda folder: _run(load(folder)),
        None if hostile else ACCIDENTS,
        120,
        1 + hostile,
    )


@pytest.mark.parametrize("hostile", [False, True])
def test_states(folders: Path, tmp_path: Path, hostile: bool) -> None:
    program = _program()

    def read(folder: Path) -> Any:
        state = load_state(folder)
        try:
            return _run(lopro_fx.apply(program, state))
        except lopro_fx.LoProError:
            raise
        except Exception as error:
            return type(error).__name__ if hostile else f"{type(error).__name__}: {error}"

    attack(folders / "state", tmp_path / "mutant", read, None if hostile else ACCIDENTS, 80, 3 + hostile)


def test_journals(folders: Path, tmp_path: Path) -> None:
    program = _program()

    def read(folder: Path) -> Any:
        return _run(lopro_fx.apply(program, lopro_fx.calibrate(program, None, CONFIG, resume=folder)))

    attack(folders / "journal", tmp_path / "mutant", read, ACCIDENTS, 60, 5)


@pytest.mark.parametrize("hostile", [False, True])
def test_transformers_folders(tmp_path: Path, hostile: bool) -> None:
    """The weights, and of the configuration what is ours: the rest is transformers' to read, and the user's to edit."""
    transformers = pytest.importorskip("transformers")
    from tests.huggingface.models import case, token_ids

    made, ids = case("tied"), token_ids(2, 7)
    lopro_fx.save_pretrained(made.model, made.state, tmp_path / "good")

    def read(folder: Path) -> Any:
        config = lopro_fx.LoProConfig(verify=not hostile)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        try:
            return loaded(ids).logits.flatten().tolist()
        except Exception as error:
            return type(error).__name__

    def change_ours(rng: random.Random, path: Path) -> None:
        if path.name != "config.json":
            return change_tensors(rng, path)
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config["quantization_config"]), encoding="utf-8")
        change_json(rng, path)
        text = path.read_text(encoding="utf-8")
        path.write_text(json.dumps({**config, "quantization_config": "OURS"}).replace('"OURS"', text), encoding="utf-8")
        return None

    files = ["config.json", "model.safetensors"] if hostile else ["model.safetensors"]
    mutators, count = ([change_ours], 100) if hostile else (ACCIDENTS, 45)
    attack(tmp_path / "good", tmp_path / "mutant", read, mutators, count, 6 + hostile, files)
