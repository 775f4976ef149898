"""README and docs: tables are those of the results, links lead somewhere, docs/format.md is enough to read a layer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lopro_fx
from benchmarks.tables import filled, pages
from lopro_fx.layer import Input, Layer, dense_weight
from lopro_fx.methods.rotation import as_index, random_signs
from tests.helpers import assert_close, generator
from tests.programs import decoder, ids

ROOT = Path(__file__).parents[1]
_PAGES = [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_pages_show_the_results_and_link_to_what_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text, "run python -m benchmarks.tables"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).exists(), link


def test_readme_is_short() -> None:
    words = [word for word in (ROOT / "README.md").read_text(encoding="utf-8").split() if any(map(str.isalnum, word))]
    assert len(words) < 750


def _codes(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes (count,) of a row of words, as docs/format.md tells."""
    words = words.view(np.uint32)
    blocks, codes, start, shift = len(words) // bits, np.zeros(count, np.int64), 0, 0
    for width in {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}[bits]:
        for index in range(count):
            word, place = divmod(index, 32 // width)
            if width == 1:
                c, j, i = place // 16, place % 16 // 4, place % 4
                offset = 8 * j + 4 * c + i
            else:
                offset = place * width
            codes[index] |= int(words[start + word] >> np.uint32(offset) & np.uint32((1 << width) - 1)) << shift
        start, shift = start + blocks * width, shift + width
    return codes


def _read(group: Input, site: Layer) -> np.ndarray:
    """The weight in the rotated coordinates, then taken back to the input's, as docs/format.md tells."""
    t = {key: tensor.numpy() for key, tensor in {**group.tensors, **site.tensors}.items()}
    rows, width = site.out_features, site.in_features
    size = width if site.weight.spec["group_size"] == -1 else site.weight.spec["group_size"]
    groups = -(-width // size)
    zeros = _codes(t["zeros"], site.weight.spec["bits"], rows * groups).reshape(rows, groups)
    codes = np.stack([_codes(row, site.weight.spec["bits"], width) for row in t["codes"]])
    column = np.arange(width) // size
    weight = t["scales"].astype(np.float64)[:, column] * (codes - zeros[:, column] - 0.5)
    if "up" in t:
        up = t["up"] * t["up_scale"].astype(np.float64) if "up_scale" in t else t["up"].astype(np.float64)
        down = t["down"].astype(np.float64)
        down = down * t["down_scale"].astype(np.float64)[:, None] if "down_scale" in t else down
        weight = weight + up @ down
    # x' = T x, column by column of the identity.
    turn = np.eye(width)[t["perm"]] if "perm" in t else np.eye(width)
    if "signs" in t and group.transform.block > 1:
        negated = np.unpackbits(t["signs"], bitorder="little")[:width].astype(bool)
        negated[: group.transform.skip] = False
        turn[negated] *= -1
    hadamard = np.ones((1, 1))
    while len(hadamard) < group.transform.block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    for start in range(group.transform.skip, width, group.transform.block) if group.transform.block > 1 else ():
        part = slice(start, start + group.transform.block)
        turn[part] = hadamard @ turn[part] / group.transform.block**0.5
    return weight @ turn


def _layers(config: lopro_fx.LoPRo) -> list[tuple[Input, Layer]]:
    _, program = decoder()
    state = lopro_fx.calibrate(program, [ids()], config)
    return [(state.inputs[site.input], site) for site in state.layers.values()]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("transform", ["full", "partial", "act_order"])
def test_the_page_on_formats_is_enough_to_read_a_layer(bits: int, transform: str) -> None:
    factors = 16 if bits == 4 else 8
    config = lopro_fx.LoPRo(
        bits=bits, group_size=-1 if bits == 2 else 32, rank=2, refits=0, sweeps=0, clip_steps=2, transforms=transform,
        salient=16, factor_bits=factors,
    )  # fmt: skip
    for group, site in _layers(config)[:3]:
        read: Tensor = torch.from_numpy(_read(group, site)).to(torch.float32)
        assert_close(site.name, read, dense_weight(group, site), 1e-5)


def test_signs_and_permutations_are_stored_as_the_page_tells() -> None:
    assert as_index(torch.randperm(40, generator=generator())).dtype == torch.int16
    assert random_signs(12, generator()).shape == (2,)
