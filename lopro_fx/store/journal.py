"""Keep each finished unit on disk, so that a stopped run continues where it was.

Only results are stored, not activations: weights that feed forward are always rebuilt from packed tensors, so a resumed
run recomputes the same activations from the same numbers. A fingerprint ties the folder to the program, its weights,
the data, the settings and the versions of lopro_fx and torch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx.__about__ import __version__
from lopro_fx.budget import Budget
from lopro_fx.errors import CheckpointError
from lopro_fx.methods.base import Method, Solved
from lopro_fx.passes.fingerprint import Digest
from lopro_fx.store.exchange import PREFIX
from lopro_fx.store.files import recover, replacing, write_json, write_tensors
from lopro_fx.store.reading import read_json
from lopro_fx.store.records import among, describe, restore, tensors_of

_LONGEST = 100
_PLAN, _MARKER = "plan.json", "run.json"
_PLAIN = re.compile(rf"[a-z0-9._]{{1,{_LONGEST}}}")


def require_journal(folder: Path) -> None:
    """Refuse a folder that holds something else than a journal.

    Raises:
        CheckpointError: it does.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}, for finished layers, exists and is no folder; rename it")
    recover(folder)
    entries = [path for path in folder.iterdir() if not path.name.startswith(PREFIX)] if folder.is_dir() else []
    if entries and not (folder / _MARKER).is_file():
        raise CheckpointError(f"{folder}, for finished layers, exists and was not written by lopro_fx; rename it")
    # Results would be written into it, and a FIFO waits for its reader.
    if strange := [path for path in entries if path.suffix in (".safetensors", ".json") and not path.is_file()]:
        raise CheckpointError(f"{strange[0]} is no regular file; delete it")


def delete_journal(folder: Path) -> None:
    """Delete a journal's files, and its folder if nothing else is in it."""
    with suppress(OSError):
        for path in (*folder.glob("*.safetensors"), folder / _PLAN, folder / _MARKER):
            path.unlink(missing_ok=True)
        folder.rmdir()


class Journal:
    """Folder with one safetensors file per finished unit.

    Raises:
        CheckpointError: the folder belongs to another run, holds something else, or can't be written.
    """

    def __init__(
        self,
        folder: str | Path,
        program: ExportedProgram,
        config: Method,
        batches: Sequence[Sequence[Any]] | None,
        budget: Budget | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._run = _fingerprint(program, config, batches, budget)
        marker = self._folder / _MARKER
        require_journal(self._folder)
        if marker.exists():
            try:
                found = read_json(marker, dict).get("fingerprint")
            except CheckpointError as error:
                raise CheckpointError(f"{error}; delete {self._folder} and start again") from error
            if found != self._run:
                raise CheckpointError(
                    f"{self._folder} holds a run of another model, calibration, setting or version; delete it or name "
                    "another"
                )
        else:
            with replacing(marker) as temporary:
                write_json(temporary, {"fingerprint": self._run, "config": config.to_dict()})

    def read(self, name: str) -> Solved | None:
        """Read a finished unit, or None; a damaged file, or one of another unit or run, counts as unfinished."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if metadata["seal"] != self._seal(name, metadata["record"], tensors):
                return None
            inputs, layers = restore(json.loads(metadata["record"]), among(tensors))
        # Bytes that were damaged may raise anything.
        except Exception:
            return None
        (shared,) = inputs.values()
        return Solved(shared, tuple(layers[reader] for reader in shared.readers))

    def write(self, solved: Solved) -> None:
        name, tensors = solved.input.name, tensors_of([solved.input], solved.layers)
        record = json.dumps(describe([solved.input], solved.layers))
        metadata = {"record": record, "seal": self._seal(name, record, tensors)}
        with replacing(self._path(name)) as temporary:
            write_tensors(temporary, tensors, metadata)

    def discard(self) -> None:
        """Forget the run, if nothing of it is finished: the folder may then hold another."""
        if not any(self._folder.glob("*.safetensors")):
            (self._folder / _MARKER).unlink(missing_ok=True)

    def read_plan(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]] | None:
        """Read the overrides of a plan and its figures, or None; a damaged file counts as no plan."""
        try:
            overrides, figures, seal = read_json(self._folder / _PLAN, list)
        except (CheckpointError, ValueError):
            return None
        return (overrides, figures) if seal == self._seal(_PLAN, _text(overrides, figures), {}) else None

    def write_plan(self, overrides: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Any]) -> None:
        settings = {name: dict(values) for name, values in overrides.items()}
        with replacing(self._folder / _PLAN) as temporary:
            write_json(temporary, [settings, dict(figures), self._seal(_PLAN, _text(settings, figures), {})])

    def _seal(self, name: str, record: str, tensors: Mapping[str, Tensor]) -> str:
        """Hash of what a file holds, of which unit and of which run."""
        digest = Digest()
        digest.text(self._run, name, record)
        for key, tensor in sorted(tensors.items()):
            digest.text(key)
            digest.value(tensor)
        return digest.hexdigest()

    def _path(self, name: str) -> Path:
        """Path for any module's name, also on a case-insensitive file system."""
        if not _PLAIN.fullmatch(name):
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
            name = f"{re.sub(r'[^A-Za-z0-9._]', '_', name)[:_LONGEST]}-{digest[:32]}"
        return self._folder / f"{name}.safetensors"


def _text(overrides: object, figures: object) -> str:
    return json.dumps([overrides, figures], sort_keys=True)


def _source(method: type[Method]) -> str:
    """Code of a method, which changes between runs while it is written; empty where there is no file of it."""
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):
        return ""


def _fingerprint(
    program: ExportedProgram, config: Method, batches: Sequence[Sequence[Any]] | None, budget: Budget | None
) -> str:
    digest = Digest()
    digest.text("" if budget is None else json.dumps(vars(budget), sort_keys=True))
    digest.text(json.dumps(config.to_dict(), sort_keys=True), __version__, torch.__version__, _source(type(config)))
    digest.program(program)
    digest.text("data-free" if batches is None else len(batches))
    for batch in batches or ():
        digest.text(len(batch))
        for value in batch:
            digest.value(value)
    return digest.hexdigest()
