"""Write files and folders so that a reader sees the old one or the whole new one, never half of either."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lopro_fx.errors import CheckpointError


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` for a file or folder; it replaces `path` when the block ends without an error.

    Raises:
        CheckpointError: writing failed; nothing is left at the temporary path and `path` is as it was.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)) / path.name
        yield temporary
        if path.is_dir() and temporary.is_dir():
            _swap(path, temporary)
        else:
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {path}: {_reason(error)}; nothing was left half-written") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary.parent, ignore_errors=True)


def _swap(folder: Path, new: Path) -> None:
    # A folder that holds files can't be renamed over, so the old one steps aside; it comes back if anything fails.
    old = new.with_name("old")
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(old, folder)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """safetensors file; tensors that share storage are written once each."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
