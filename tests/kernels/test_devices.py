"""Every operator refuses operands on different devices; on one device, meta included, it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels.cpu import native
from tests.kernels.samples import operators
from tests.triton.problems import problem

OPERATORS = operators()
# One operand has no other to be elsewhere than; the result is a tensor too.
SEVERAL = [name for name in OPERATORS if str(getattr(torch.ops.lopro, name).default._schema).count("Tensor") > 2]
_VALUES = {"int": 1, "float": 0.0, "str": "", "bool": False}


def _arguments(operator: Any) -> list[tuple[str, Any]]:
    """(type, value) of every argument, tensors on the CPU; the check doesn't look at sizes."""
    kinds = [str(argument.real_type) for argument in operator._schema.arguments]
    return [(kind, torch.zeros(1) if "Tensor" in kind else _VALUES.get(kind, torch.float32)) for kind in kinds]


def test_the_list_of_operators_is_not_empty() -> None:
    assert {"cpu_site", "packed_embedding", "packed_int8", "packed_linear", "packed_site", "project", "rotate"} <= set(
        SEVERAL
    )


@pytest.mark.parametrize("name", SEVERAL)
def test_one_operand_elsewhere_is_refused(name: str) -> None:
    native.load()
    operator = getattr(torch.ops.lopro, name).default
    arguments = _arguments(operator)
    places = [index for index, (kind, _) in enumerate(arguments) if "Tensor" in kind]
    for place in places:
        for at, elsewhere in (("cpu", "meta"), ("meta", "cpu")):
            values = [value.to(elsewhere if index == place else at) if isinstance(value, Tensor) else value
                      for index, (_, value) in enumerate(arguments)]  # fmt: skip
            with pytest.raises(ValueError, match=rf"lopro::{name}\b.*meta"):
                operator(*values)


@pytest.mark.parametrize("operator", ["packed_site", "cpu_site"])
def test_all_on_meta_gives_the_shape(operator: str) -> None:
    arguments = problem(3, 192, 72, 3, 64, rank=4, block=64, permuted=True, biased=True).args
    run, more = getattr(torch.ops.lopro, operator), (0,) if operator == "cpu_site" else ()
    result = run(*arguments("meta"), *more)
    assert (result.device.type, result.shape) == ("meta", (3, 72))
    assert run(*arguments(), *more).shape == (3, 72)
