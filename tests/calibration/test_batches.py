"""Calibration batches in every form that a user may hand over, and what is said about one that doesn't fit."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from lopro_fx.calibration.batches import flatten_batches
from lopro_fx.errors import CalibrationError
from tests.programs import Scaled, decoder, export, ids, rows, seeded


@pytest.fixture(scope="module")
def program():
    return decoder()[1]


@pytest.fixture(scope="module")
def keyword():
    """Program of `(pair, *, mask, bias)`."""
    return export(seeded(Scaled()), (rows(4), rows(4)), mask=rows(4), bias=rows(1))


def _mapping(**items: Any) -> UserDict:
    """What a Hugging Face tokenizer returns: a mapping that is no dict."""
    return UserDict(items)


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: (t,), lambda t: [t], lambda t: ((t,), {}), lambda t: ([t], {})]
)
def test_positional_forms_are_the_same_batch(program, wrap) -> None:
    batches = flatten_batches(program, [wrap(ids()), wrap(ids(3, 5))])
    assert len(batches) == 2
    assert torch.equal(batches[0][0], ids())
    assert torch.equal(batches[1][0], ids(3, 5))


def test_keyword_inputs_come_in_any_order(keyword) -> None:
    pair, mask, bias = (rows(4, seed=1), rows(4, seed=2)), rows(4, seed=3), rows(1, seed=4)
    for kwargs in ({"mask": mask, "bias": bias}, {"bias": bias, "mask": mask}):
        (batch,) = flatten_batches(keyword, [((pair,), kwargs)])
        assert all(torch.equal(a, b) for a, b in zip(batch, (*pair, mask, bias), strict=True))


@pytest.mark.parametrize("kind", [dict, _mapping])
def test_a_mapping_is_keyword_inputs(kind) -> None:
    module = seeded(torch.nn.Linear(32, 8))
    program = torch.export.export(module, (), {"input": rows(4)}, strict=False)
    (batch,) = flatten_batches(program, [kind(input=rows(4, seed=1))])
    assert torch.equal(batch[0], rows(4, seed=1))


def test_a_generator_is_read_once(program) -> None:
    assert len(flatten_batches(program, (ids(seed=i) for i in range(3)))) == 3


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (ids().to(torch.int32), r"batch 1.*'input_ids'.*torch\.int32.*torch\.int64"),
        (ids()[0], r"batch 1.*'input_ids'.*\(9,\)"),
        (ids()[None], r"batch 1.*'input_ids'.*\(1, 2, 9\)"),
        ((ids(), ids()), "batch 1.*structure"),
        ((), "batch 1.*structure"),
        ([[1, 2, 3]], "batch 1.*structure"),
        (((5,), {}), "batch 1.*'input_ids'.*int"),
        (5, "batch 1.*'input_ids'.*int"),
        ("text", "batch 1.*'input_ids'.*str"),
        (None, "batch 1"),
        ({"input_ids": ids()}, r"batch 1.*\['input_ids'\].*\[\]"),
        (((ids(),), {"mask": ids()}), r"batch 1.*\['mask'\].*\[\]"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(program, batch, message) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        flatten_batches(program, [ids(), batch])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (((rows(4), rows(4)),), {"mask": rows(4)}),
            r"\['mask'\].*\['bias', 'mask'\]",
        ),
        (((rows(4), rows(4)), {"mask": rows(4), "bias": rows(1)}), "structure"),
        (
            (((rows(4), rows(5)),), {"mask": rows(4), "bias": rows(1)}),
            r"'pair_1'.*\(5, 32\).*\(4, 32\)",
        ),
        ((((rows(4), rows(4)),), {"mask": rows(4).half(), "bias": rows(1)}), r"'mask'.*torch\.float16.*torch\.float32"),
    ],
)
def test_a_nested_or_keyword_input_is_named(keyword, batch, message) -> None:
    with pytest.raises(CalibrationError, match=message):
        flatten_batches(keyword, [batch])


@pytest.mark.parametrize("empty", [[], (), iter(())])
def test_no_batch_is_an_error(program, empty) -> None:
    with pytest.raises(CalibrationError, match="calibration=None"):
        flatten_batches(program, empty)


def test_sizes_beyond_the_range_of_the_export_are_refused() -> None:
    """Node by node, the graph runs on them, and does what was traced for others."""

    class Blocks(nn.Module):
        """Doubles the first eight rows, which for fewer is every row."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([2 * x[:8], x[8:]])

    sizes = ({0: Dim("rows", min=3, max=7)},)
    program = torch.export.export(Blocks(), (rows(4),), dynamic_shapes=sizes, strict=False)
    assert flatten_batches(program, [rows(3), rows(7)])
    for count in (2, 8):
        with pytest.raises(CalibrationError, match=f"dimension 0 is {count}; the program was exported for 3 to 7"):
            flatten_batches(program, [rows(4), rows(count)])


@pytest.mark.parametrize("dim", [Dim.AUTO, Dim("rows", min=1)])
def test_sizes_without_a_range_are_free(dim: Any) -> None:
    program = torch.export.export(nn.Linear(32, 4), (rows(4),), dynamic_shapes=({0: dim},), strict=False)
    assert flatten_batches(program, [rows(1), rows(4000)])
