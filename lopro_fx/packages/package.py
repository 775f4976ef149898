"""One `.pt2` with the prefill and the decode program, their weights once, tokenizer and manifest.

    data/aotinductor/prefill/…, data/aotinductor/decode/…   compiled programs
    data/weights/…                                          every tensor once, in torch.save's form
    extra/lopro_fx.json                                     manifest, with the SHA-256 of every other member
    extra/tokenizer/…                                       the tokenizer's text files

A process without lopro_fx reads it with `load_pt2(path, load_weights_from_disk=True)` of
`torch.export.pt2_archive._package`; one without Python as in `examples/cpp`.
"""

from __future__ import annotations

import hashlib
import json
import stat
import tempfile
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from torch.export import ExportedProgram

from lopro_fx.__about__ import __version__
from lopro_fx.errors import CheckpointError, first_line
from lopro_fx.generation.cache import BITS
from lopro_fx.generation.generator import Generator
from lopro_fx.generation.programs import DECODE, PREFILL, CacheSpec, GenerationPrograms
from lopro_fx.kernels.activation.delivery import DEFAULT
from lopro_fx.kernels.scratch import compiler_folder
from lopro_fx.packages import processor
from lopro_fx.packages.aoti import AotiResult, check_name, compile_program, size_bound, warn_of_python
from lopro_fx.passes import compat
from lopro_fx.passes.optimize import optimize
from lopro_fx.passes.record import is_quantised, record_of
from lopro_fx.report.traffic import weight_bytes
from lopro_fx.store.files import reason_of, replacing

FORMAT, VERSION = "lopro_fx package", 1
_MANIFEST, _TOKENIZER = "lopro_fx.json", "tokenizer/"
_ROOT = "package"
_EXTRA, _WEIGHTS = "extra/", "data/weights/"
# Bytes above which a tensor is not compressed: packed codes don't shrink, and trying takes time.
_LARGE = 1 << 16

# A package unpacks to no more than this many times its size, and this many bytes.
_MOST_GROWTH, _LEAST_GROWTH = 20, 1 << 26
_MOST_MANIFEST = 1 << 24
_CHUNK = 1 << 20
# What zipfile raises for damaged archives.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError)
# Keys of the programs' metadata that older packages lack.
_NEWER = ("vocabulary",)


def package(
    programs: GenerationPrograms, path: str | Path, tokenizer: Any = None, *, activations: str = DEFAULT
) -> AotiResult:
    """Compile both programs for the device that their weights are on and write them as one package.

    Quantised programs are optimised first (`optimize`). Code for the CPU is for the processor that this runs on.

    Args:
        programs: from `export_for_generation`, quantised (`programs.map(lambda p: lopro_fx.apply(p, state))`) or not.
        path: the file to write, ending in `.pt2`; one that exists is replaced when all went well.
        tokenizer: of Hugging Face; its files travel in the package.
        activations: on the CPU, "int8" rounds the input of a packed Linear to 8 bits, with a scale per token and column
            group; "float" keeps it.

    Returns:
        Path, bytes, their bound, and the seconds that it took.

    Raises:
        CheckpointError: the name doesn't end in `.pt2`, or the file can't be written (nothing is left half-written).
        GraphError: AOTInductor can't compile a program, or finds no C++ compiler.
    """
    path = check_name(path)
    started = time.monotonic()
    device = next(iter(programs.decode.state_dict.values())).device
    programs = programs.map(lambda program: _prepared(program, device, activations))
    warn_of_python(program for _, program in programs.items())
    with replacing(path) as temporary, compiler_folder(temporary.parent) as folder:
        notes = _flat(programs.cache)
        files = {
            name: compile_program(program, folder / name, apart=True, metadata=notes)
            for name, program in programs.items()
        }
        try:
            whole = folder / "whole.pt2"
            compat.write_package(str(whole), files, _tokenizer_files(tokenizer))
            _compress(whole, temporary, _manifest(programs, device, activations, tokenizer))
        except RuntimeError as error:
            raise CheckpointError(f"could not write {path}: {reason_of(error)}; nothing was left of it") from error
    return AotiResult(path, path.stat().st_size, size_bound(programs.decode), time.monotonic() - started)


def load_package(path: str | Path, *, device_index: int = -1) -> Generator:
    """Load a package, ready to generate; its tokenizer is `generator.tokenizer` if transformers is installed.

    A package is native code, which runs with your rights: load only what you trust. The checks find damage and
    mix-ups, not malice.

    The weights are freed with the Generator. Its machine code stays mapped as long as the process runs, and each load
    maps it anew: about a megabyte for a small model.

    Args:
        path: what `package` wrote.
        device_index: which GPU, for a package compiled for one.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, not a package of ours or of another version, was
            compiled for another processor or device, or its manifest describes other programs.
    """
    path = Path(path)
    manifest = read_manifest(path)
    device = _require_device(path, manifest, device_index)
    try:
        programs = compat.load_package(str(path), device_index)
    except (RuntimeError, LookupError, TypeError, OverflowError, UnpicklingError, *_UNREADABLE) as error:
        raise CheckpointError(
            f"{path}, written by torch {manifest['torch']}, can't be loaded by torch {torch.__version__}: "
            f"{first_line(error)}"
        ) from error
    cache = CacheSpec.from_dict(manifest["cache"])
    _require_described(path, {**_flat(cache), "AOTI_DEVICE_KEY": manifest["device"]}, programs)
    return Generator(
        programs[PREFILL], programs[DECODE], cache, tokenizer=lambda: _tokenizer(path), device=device, info=manifest
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a package's manifest, after checking its types and that every byte of the package is as it was written.

    Packages of before manifests had hashes are checked by their CRC alone.

    Raises:
        CheckpointError: as `load_package`.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no file; a package is one")
    try:
        with zipfile.ZipFile(path) as archive:
            members = _plain_members(path, archive)
            manifest = _parsed(path, archive, members.pop(_EXTRA + _MANIFEST, None))
            _require_whole(path, archive, members, manifest.get("members"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is truncated, or no package ({first_line(error)}); write it again") from error
    return manifest


def _parsed(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo | None) -> dict[str, Any]:
    """Read the manifest and check the type of what is read of it later.

    Raises:
        CheckpointError: it is none of ours, of another version, or an entry has another type.
    """
    if member is not None and member.file_size > _MOST_MANIFEST:
        raise CheckpointError(
            f"{path}: its manifest has {member.file_size:,} bytes, {_MOST_MANIFEST:,} at most are read"
        )
    try:
        manifest = json.loads(archive.read(member)) if member is not None else {}
    except (*_UNREADABLE, RecursionError) as error:
        raise CheckpointError(f"{path}: its manifest is damaged: {first_line(error)}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not written by lopro_fx.package; torch._inductor.aoti_load_package loads a single program"
        )
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest.get('version')}, but lopro_fx {__version__} reads version {VERSION}: "
            f"use the lopro_fx that wrote it ({manifest.get('lopro_fx')})"
        )
    wrong = _wrong_entry(manifest)
    if wrong is not None:
        raise CheckpointError(f"{path}: its manifest is damaged: {wrong} is missing, or not what packages hold")
    return manifest


def _wrong_entry(manifest: dict[str, Any]) -> str | None:
    """Name an entry that `_manifest` would not write; None if there is none."""
    cache, members, sets = manifest.get("cache"), manifest.get("members", {}), manifest.get("instruction_sets")
    if not isinstance(cache, dict) or not set(cache) <= {field.name for field in fields(CacheSpec)}:
        return "cache"
    texts = ("lopro_fx", "torch", "device", "machine", "activations")
    right = {name: isinstance(manifest.get(name), str) for name in texts}
    right["instruction_sets"] = isinstance(sets, list) and all(isinstance(name, str) for name in sets)
    right["decode_bytes"] = _is_count(manifest.get("decode_bytes"))
    right["members"] = isinstance(members, dict) and all(isinstance(digest, str) for digest in members.values())
    right |= {f"cache.{name}": _is_count(cache.get(name)) for name in ("batch_size", "max_cache_len", "vocabulary")}
    right |= {f"cache.{name}": _are_sizes(cache.get(name)) for name in ("keys", "values")}
    right["cache.dtype"] = isinstance(getattr(torch, str(cache.get("dtype")), None), torch.dtype)
    right["cache.bits"] = type(cache.get("bits", 0)) is int and cache.get("bits", 0) in BITS
    return next((name for name, is_right in right.items() if not is_right), None)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 63


def _are_sizes(value: Any) -> bool:
    """Whether it is [[heads, head_dim], …]."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)) for pair in value
    )


def _require_whole(
    path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], digests: Mapping[str, str] | None
) -> None:
    """Read every member once, for its CRC, and compare its SHA-256 if there are `digests`.

    Raises:
        CheckpointError: names a member that is missing, changed or too many.
    """
    for name in sorted(members.keys() ^ digests.keys()) if digests is not None else ():
        state = "is not one of those that were written" if name in members else "is missing"
        raise CheckpointError(f"{path} is damaged: {name} {state}")
    for name, member in members.items():
        digest = hashlib.sha256()
        try:
            with archive.open(member) as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except _UNREADABLE as error:
            raise CheckpointError(f"{path} is damaged: {name} can't be read: {first_line(error)}") from error
        if digests is not None and digest.hexdigest() != digests[name]:
            raise CheckpointError(f"{path} is damaged: {name} is not as it was written")


def _require_described(
    path: Path, described: Mapping[str, str], programs: Mapping[str, compat.CompiledProgram]
) -> None:
    """Refuse programs that were compiled for other inputs: they would read and write beyond what they are given.

    Raises:
        CheckpointError: names the program, and the key of its metadata.
    """
    for name in (PREFILL, DECODE):
        if name not in programs:
            raise CheckpointError(f"{path} holds no program '{name}'; write it again")
        metadata = programs[name].metadata
        for key, value in described.items():
            found = metadata.get(key, value if key in _NEWER else None)
            if found != value:
                raise CheckpointError(
                    f"{path}: its manifest has {key} {value!r}, but '{name}' was compiled for {found!r}; write it again"
                )


def _plain_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Members by their names inside the archive's folder.

    Raises:
        CheckpointError: one would be written outside of the folder that torch unpacks to, or is encrypted or packed
            otherwise than in a package; two have one name; or they grow without measure.
    """
    members = archive.infolist()
    for member in members:
        name = PurePosixPath(member.filename)
        link = stat.S_ISLNK(member.external_attr >> 16)
        if link or name.is_absolute() or ".." in name.parts or set(member.filename) & set("\\:\0"):
            raise CheckpointError(f"{path}: its member {member.filename!r} is outside of the package; don't load it")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(f"{path}: its member {member.filename!r} is packed otherwise than in a package")
    inner = {_inner(member): member for member in members}
    if len(inner) < len(members):
        raise CheckpointError(f"{path} holds two members of one name; write it again")
    size = sum(member.file_size for member in members)
    if size > _MOST_GROWTH * path.stat().st_size + _LEAST_GROWTH:
        raise CheckpointError(f"{path} would unpack to {size:,} bytes, more than packages do; don't load it")
    return inner


def _inner(member: zipfile.ZipInfo) -> str:
    """Name without the first folder, which is the archive's name."""
    return member.filename.partition("/")[2]


def _prepared(program: ExportedProgram, device: torch.device, activations: str) -> ExportedProgram:
    return optimize(program, target=device.type, activations=activations) if is_quantised(program) else program


def _manifest(programs: GenerationPrograms, device: torch.device, activations: str, tokenizer: Any) -> dict[str, Any]:
    decode = programs.decode
    return {
        "format": FORMAT,
        "version": VERSION,
        "lopro_fx": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "machine": processor.machine(),
        "instruction_sets": processor.instruction_sets() if device.type == "cpu" else [],
        "activations": activations if device.type == "cpu" else "float",
        "cache": programs.cache.to_dict(),
        "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        "config": record_of(decode, "package").get("config") if is_quantised(decode) else None,
        "decode_bytes": weight_bytes(decode),
    }


def _compress(source: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Copy the archive, compressing all but large tensors, and add the manifest with the hashes of all members.

    torch reads compressed entries, but can't write them.
    """
    digests: dict[str, str] = {}
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as smaller:

        def write(inner: str, content: bytes | str, method: int) -> None:
            # Without the time and the name of the file: the same input makes the same bytes.
            plain = zipfile.ZipInfo(f"{_ROOT}/{inner}")
            plain.external_attr = 0o600 << 16
            smaller.writestr(plain, content, method)

        for info in archive.infolist():
            inner, content = _inner(info), archive.read(info)
            large = inner.startswith(_WEIGHTS) and info.file_size > _LARGE
            write(inner, content, zipfile.ZIP_STORED if large else zipfile.ZIP_DEFLATED)
            digests[inner] = hashlib.sha256(content).hexdigest()
        text = json.dumps({**manifest, "members": digests}, indent=1)
        write(_EXTRA + _MANIFEST, text, zipfile.ZIP_DEFLATED)


def _flat(cache: CacheSpec) -> dict[str, str]:
    """Describe the cache in strings that a program without a JSON reader can split."""
    shapes = [f"{heads}x{columns}" for heads, columns in cache.stored_sizes()]
    return {
        "batch_size": str(cache.batch_size),
        "max_cache_len": str(cache.max_cache_len),
        "cache_dtype": str(cache.stored_dtype).removeprefix("torch."),
        "cache_heads": " ".join(shapes),
        "vocabulary": str(cache.vocabulary),
    }


def _tokenizer_files(tokenizer: Any) -> dict[str, str]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {}
        for file in Path(folder).rglob("*"):
            try:
                files[_TOKENIZER + file.relative_to(folder).as_posix()] = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, IsADirectoryError):  # tokenizer.json holds the same as the older binary form
                continue
    return files


def _tokenizer(path: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        for name in archive.namelist():
            inner = name.partition("/")[2]
            if inner.startswith(_EXTRA + _TOKENIZER):
                target = Path(folder, Path(inner).name)
                target.write_bytes(archive.read(name))
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if any(Path(folder).iterdir()) else None


def _require_device(path: Path, manifest: dict[str, Any], device_index: int) -> torch.device:
    if manifest["device"] == "cpu":
        reason = processor.mismatch(manifest["machine"], manifest["instruction_sets"])
        if reason:
            raise CheckpointError(f"{path} was compiled for another processor: {reason}; package it on this machine")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CheckpointError(f"{path} was compiled for {manifest['device']}, and torch sees no such device here")
    return torch.device("cuda", max(device_index, 0))
