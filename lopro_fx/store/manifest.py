"""Manifest of a saved folder: its writer, its format, and the SHA-256 of every file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lopro_fx.__about__ import __version__
from lopro_fx.errors import CheckpointError
from lopro_fx.store.files import recover, require_writable, write_json
from lopro_fx.store.reading import read_json, require_file

MANIFEST = "lopro_fx.json"
JOURNAL = ".partial"  # of an unfinished run, inside a folder whose parent isn't writable
FORMAT = "lopro_fx checkpoint"
VERSION = 3
# Versions that are read: a program is the same in both.
_READ = (2, VERSION)
# Files of tokenizers, configurations and reports beside a program.
_COMPANIONS = ("report.json", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
               "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*", "*.model")  # fmt: skip


def write_manifest(folder: Path, kind: str, files: Sequence[str]) -> None:
    """Describe `files`, which `folder` holds already; `kind` is "program" or "state"."""
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in files}
    write_json(
        folder / MANIFEST,
        {"format": FORMAT, "version": VERSION, "kind": kind, "lopro_fx": __version__, "torch": torch.__version__,
         "files": entries},
    )  # fmt: skip


def read_manifest(folder: Path, kind: str, files: Sequence[str]) -> dict[str, Any]:
    """Read the manifest, after checking that `folder` holds a `kind` whose `files` are all intact.

    Raises:
        CheckpointError: no such folder, not written by lopro_fx, another format version, or a file is missing,
            truncated or changed.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder" if not folder.exists() else f"{folder} is not a folder")
    manifest = _parsed(folder)
    if manifest.get("version") not in _READ:
        raise CheckpointError(
            f"{folder} has format version {manifest.get('version')}, but lopro_fx {__version__} reads version "
            f"{' and '.join(map(str, _READ))}: use the lopro_fx that wrote it ({manifest.get('lopro_fx')})"
        )
    if manifest.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a {manifest.get('kind')}, not a {kind}")
    for name in files:
        _check(folder / name, manifest)
    return manifest


def add_companions(folder: Path) -> None:
    """List the other files of `folder` in its manifest, as written by us too: the user may edit them."""
    manifest = _parsed(folder)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others = names - {MANIFEST, *manifest["files"]}
    write_json(folder / MANIFEST, {**manifest, "companions": {name: sha256(folder / name) for name in others}})


def written(folder: Path) -> set[str]:
    """Names of the files in `folder` that its manifest lists, without edited companions; none without a manifest."""
    try:
        manifest = _parsed(folder)
    except CheckpointError:
        return set()
    companions = manifest.get("companions")
    return {MANIFEST, *manifest["files"], *(unchanged(folder, companions) if isinstance(companions, dict) else ())}


def unchanged(folder: Path, digests: Mapping[str, Any]) -> set[str]:
    """Names of the files that still have their SHA-256."""
    return {name for name, digest in digests.items() if _has(folder, name, digest)}


def _has(folder: Path, name: str, digest: Any) -> bool:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    try:
        return (folder / name).is_file() and sha256(folder / name) == digest
    except (OSError, ValueError):  # no name of a file, or one that can't be read
        return False


def companions_in(folder: Path) -> set[str]:
    """Names that files of tokenizers and configurations have, of those in `folder`."""
    return {path.name for path in folder.iterdir() if any(path.match(pattern) for pattern in _COMPANIONS)}


def is_ours(folder: Path) -> bool:
    """Whether `folder` may be written: it is absent, empty but for a journal, or holds what lopro_fx wrote."""
    if not folder.is_dir():
        return not folder.exists()
    return (folder / MANIFEST).is_file() or all(path.name == JOURNAL for path in folder.iterdir())


def require_ours(folder: Path) -> None:
    """Refuse a folder that lopro_fx has not written, or that can't be written.

    Raises:
        CheckpointError: `folder` is a file, holds something else, or can't be written.
    """
    recover(folder)
    if not is_ours(folder):
        raise CheckpointError(f"{folder} exists and was not written by lopro_fx; name another folder or delete it")
    require_writable(folder)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _parsed(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} was not written by lopro_fx: it has no {MANIFEST}")
    manifest = read_json(folder / MANIFEST, dict)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{folder} was not written by lopro_fx: its {MANIFEST} does not name the format")
    return manifest


def _check(path: Path, manifest: dict[str, Any]) -> None:
    try:
        entry = manifest["files"][path.name]
        size, digest = entry["bytes"], entry["sha256"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path.with_name(MANIFEST)} is damaged: it does not describe {path.name}") from error
    if (found := require_file(path)) != size:
        raise CheckpointError(f"{path} is truncated or changed: {found} bytes, {size} were written")
    try:
        if sha256(path) != digest:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one that was written")
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
