"""What is no program, method, device or pattern is refused, or said, before the work."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import nn

import lopro_fx
from lopro_fx import GPTQ, RTN, ConfigError, GraphError, LoPRo
from tests.programs import decoder, ids


@pytest.mark.parametrize("call", [lopro_fx.quantize, lopro_fx.calibrate, lopro_fx.explain])
def test_a_module_is_no_program(call: Any) -> None:
    with pytest.raises(GraphError, match=r"Linear was given.*ExportedProgram"):
        call(nn.Linear(32, 32))


@pytest.mark.parametrize("config", ["rtn", RTN, 3, Namespace(**vars(RTN()))])
def test_a_method_is_a_configuration(config: Any) -> None:
    with pytest.raises(ConfigError, match="RTN"):
        lopro_fx.calibrate(decoder()[1], None, config)


@pytest.mark.parametrize("device", [True, 1.5, [], "", "mps", "gpu", "tpu:1", None])
def test_a_device_is_a_name(device: Any) -> None:
    if device is None:
        assert lopro_fx.devices.available("auto").type in ("cpu", "cuda")
        return
    with pytest.raises(ConfigError) as caught:
        lopro_fx.calibrate(decoder()[1], None, RTN(), device=device)
    assert "cuda" in str(caught.value)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 3.0}, {"bits": True}, {"group_size": 64.0}, {"rank": 2.5}, {"refits": 1.0}, {"clip_steps": 1.5},
     {"seed": 1.5}, {"head_bits": 8.0}, {"sequential": "no"}, {"signs": 2}, {"salient": 4.5}, {"include": 5},
     {"include": (5,)}, {"exclude": None}],
    ids=str,
)  # fmt: skip
def test_values_of_another_type_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoPRo(**wrong)


def test_a_pattern_that_matches_nothing_is_said() -> None:
    program = decoder()[1]
    with pytest.warns(UserWarning, match=r"exclude='\*q_porj' matches no Linear"):
        lopro_fx.calibrate(program, None, RTN(exclude=("*q_porj",)))


def test_batches_without_a_token_are_said_to_be_data_free() -> None:
    program = torch.export.export(
        nn.Sequential(nn.Linear(32, 32)), (torch.ones(2, 32),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    with pytest.warns(UserWarning, match="holds no token"):
        lopro_fx.calibrate(program, [torch.ones(0, 32)], GPTQ(bits=4, group_size=32))


def test_a_quantised_program_is_known() -> None:
    program = lopro_fx.quantize(decoder()[1], [ids()], RTN(bits=8, group_size=32, head_bits=8))
    with pytest.raises(GraphError, match="quantised already"):
        lopro_fx.calibrate(program, [ids()], RTN())
