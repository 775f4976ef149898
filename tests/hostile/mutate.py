"""Seeded damage to files: bytes, JSON values, safetensors headers, and what stands in a file's place."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutator = Callable[[random.Random, Path], None]


def _deep() -> Any:
    value: Any = 0
    for _ in range(300):
        value = [value]
    return value


# Values that a reader doesn't expect.
_STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 2**70, 1e308, float("nan"), "", "x", "../../x", "cuda:99", "meta",
    "9**9**9**9**9", [], {}, [[]], {"x": None}, "a" * 5000,
)  # fmt: skip


def _bytes(change: Callable[[random.Random, bytearray], bytes | bytearray]) -> Mutator:
    def mutate(rng: random.Random, path: Path) -> None:
        path.write_bytes(change(rng, bytearray(path.read_bytes())))

    return mutate


def _flip(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.choice((1, 1, 16))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _zero(rng: random.Random, data: bytearray) -> bytearray:
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.choice((8, 512, 4096)))
    data[start : start + length] = bytes(length)
    return data


def _swap(rng: random.Random, path: Path) -> None:
    others = sorted(other for other in path.parent.iterdir() if other != path and other.is_file())
    if others:
        other = rng.choice(others)
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)


def _fifo(_: random.Random, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _endless(_: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _folder(_: random.Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def _missing(_: random.Random, path: Path) -> None:
    path.unlink()


ACCIDENTS: tuple[Mutator, ...] = (
    *[_bytes(_flip)] * 4,
    *[_bytes(_zero)] * 2,
    *[_bytes(lambda rng, data: data[: rng.randrange(len(data))])] * 2,
    _bytes(lambda rng, data: data + bytes(rng.choice((1, 4096)))),
    _bytes(lambda _, data: data[:0]),
    _swap, _fifo, _endless, _folder, _missing,
)  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    found = [(value, key) for key, _ in items]
    for _, item in items:
        if isinstance(item, (dict, list)):
            found += _places(item)
    return found


def _change_json(rng: random.Random, value: Any) -> Any:
    for _ in range(rng.choice((1, 1, 1, 3))):
        places = _places(value)
        if not places:
            break
        container, key = rng.choice(places)
        if rng.random() < 0.2 and isinstance(container, dict):
            del container[key]
        elif rng.random() < 0.05:
            container[key] = _deep()
        else:
            container[key] = rng.choice(_STRANGE)
    return rng.choice(_STRANGE) if rng.random() < 0.05 else value


def change_json(rng: random.Random, path: Path) -> None:
    if rng.random() < 0.03:
        path.write_text("[" * 100_000)
    else:
        path.write_text(json.dumps(_change_json(rng, json.loads(path.read_text(encoding="utf-8")))))


def change_tensors(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = sorted(name for name in header if name != "__metadata__")
    kind, name = rng.randrange(7), rng.choice(names)
    start, end = header[name]["data_offsets"]
    if kind == 0:
        header[name]["dtype"] = rng.choice(("F32", "F16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64"))
    elif kind == 1:
        header[name]["shape"] = rng.choice(
            ([], [0], [2**40], [-1], header[name]["shape"][::-1], [1, *header[name]["shape"]])
        )
    elif kind == 2:
        header[name]["data_offsets"] = rng.choice(([0, 2**62], [-8, 8], [end, start], [start, end + 1]))
    elif kind == 3:
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == 4:
        body[start:end] = rng.choice((b"\xff", b"\x7f", b"\x80", b"\x00")) * (end - start)
    elif kind == 5:
        del header[name]
    else:
        header = _change_json(rng, header)
    text = json.dumps(header).encode()
    size = rng.choice((len(text), len(text), len(text), 2**62))
    path.write_bytes(struct.pack("<Q", size) + text + body)


def mutant(source: Path, place: Path, file: str, mutate: Mutator, seed: int) -> Path:
    """A copy of the folder `source` in `place` whose `file` is damaged."""
    shutil.rmtree(place, ignore_errors=True)
    folder = Path(shutil.copytree(source, place))
    mutate(random.Random(seed), folder / file)
    return folder
