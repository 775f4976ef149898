"""List of a folder's files, with their sizes and SHA-256, in the report that lies there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lopro_fx.errors import CheckpointError
from lopro_fx.store.manifest import companions_in, sha256, unchanged
from lopro_fx.store.reading import entry, read_json, require_file

REPORT = "lopro_fx_report.json"


def list_files(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file of a folder, by its name there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in files}  # fmt: skip


def written(folder: Path) -> set[str]:
    """Names of a folder's files that the report lists, without edited ones; without a list, what saving writes."""
    try:
        files = entry(read_json(folder / REPORT, dict), "files", dict, folder / REPORT)
        shards = {name for name in files if name.endswith(".safetensors")}
        digests = {name: own.get("sha256") for name, own in files.items() if isinstance(own, dict)}
        listed = shards | unchanged(folder, {name: digests[name] for name in digests.keys() - shards})
    except CheckpointError:
        shards = {path.name for path in folder.glob("model*.safetensors*")}
        listed = companions_in(folder) | shards if (folder / REPORT).exists() else set()
    return {REPORT, *listed}


def require_listed(files: Iterable[str]) -> None:
    """Compare files with the list in the report beside them.

    Raises:
        CheckpointError: a file differs or isn't listed, or there is no such list.
    """
    for path in map(Path, files):
        report = path.parent / REPORT
        try:
            own = entry(entry(read_json(report, dict), "files", dict, report), path.name, dict, report)
            size, digest = own["bytes"], own["sha256"]
        except (CheckpointError, KeyError) as error:
            raise CheckpointError(
                f"{path} can't be verified, because {report} is missing or doesn't list it: load without verify=True, "
                "or save the model again by lopro_fx.save_pretrained"
            ) from error
        try:
            if (have := require_file(path)) != size:
                raise CheckpointError(f"{path} has {have} bytes, but {size} were written: copy it or save it again")
            if sha256(path) != digest:
                raise CheckpointError(f"{path} is not what was written, by its SHA-256: copy it or save it again")
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
