"""Which kernels a CUDA tensor gets, decided by what is known of the number of tokens; no device is needed to ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels import dispatch
from tests.triton.problems import Problem, problem


class _Calls(TorchDispatchMode):
    """Names of the `lopro::` operators that reach the dispatcher's end."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lopro":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def _on_cuda(like: torch.Tensor) -> torch.Tensor:
    """A fake CUDA tensor, which takes no device."""
    return torch.empty(like.shape, dtype=like.dtype, device="cuda")


def _calls(p: Problem, mode: FakeTensorMode, x: torch.Tensor | None = None) -> tuple[list[str], torch.Tensor]:
    with mode, _Calls() as calls:
        args = [_on_cuda(v) if isinstance(v, torch.Tensor) else v for v in p.__dict__.values()]
        y = torch.ops.lopro.packed_site(args[0] if x is None else x, *args[1:])
    return calls.names, y


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1, ["decode_prepare", "decode_product"]),
        (2, ["rotate_project", "packed_linear_device"]),
        (dispatch.DENSE_TOKENS, ["rotate_project", "packed_linear_device"]),
        (dispatch.DENSE_TOKENS + 1, ["rotate_device", "dequantize_device"]),
    ],
)
def test_the_number_of_tokens_decides(tokens: int, expected: list[str]) -> None:
    names, y = _calls(problem(tokens, 192, 72, 3, 64, rank=4, block=64), FakeTensorMode())
    assert names == expected
    assert y.shape == (tokens, 72)
    assert y.device.type == "cuda"


def test_columns_left_alone_take_a_rotation_of_their_own() -> None:
    names, _ = _calls(problem(1, 192, 72, 3, 64, rank=4, block=64, skip=64), FakeTensorMode())
    assert names == ["rotate_project", "decode_prepare", "decode_product"]


def test_a_site_without_a_low_rank_branch_is_rotated_alone() -> None:
    names, _ = _calls(problem(2, 192, 72, 3, 64, block=64), FakeTensorMode())
    assert names == ["rotate_device", "packed_linear_device"]


def test_a_free_number_of_tokens_is_not_guarded() -> None:
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    p = problem(7, 192, 72, 3, 64, rank=4, block=64)
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    with mode:
        x = _on_cuda(mode.from_tensor(p.x, symbolic_context=dynamic))
    guards = len(shapes.guards)
    names, y = _calls(p, mode, x)
    assert names == ["rotate_device", "dequantize_device"]
    assert isinstance(y.shape[0], torch.SymInt)
    assert len(shapes.guards) == guards


@pytest.mark.parametrize(("tokens", "bits", "expected"), [
    (dispatch.DENSE_TOKENS, 4, ["round_device", "int8_matmul_device"]),
    (dispatch.DENSE_TOKENS + 1, 4, ["round_device", "dequantize_device", "dense_int8_device"]),
    (dispatch.DENSE_TOKENS + 1, 8, ["round_device", "int8_matmul_device"]),
])  # fmt: skip
def test_integer_activations(tokens: int, bits: int, expected: list[str]) -> None:
    p = problem(tokens, 192, 72, bits, 64, block=64)
    with FakeTensorMode(), _Calls() as calls:
        x, perm, signs, block, skip, _, _, *rest = (_on_cuda(v) if isinstance(v, torch.Tensor) else v for v in p.args())
        codes, scales, zeros, bias, up, up_scale, _, _ = rest
        weight = (codes, scales, zeros, bias, None, up, up_scale, bits, 64, 8, -1)
        y = torch.ops.lopro.packed_int8(x, perm, signs, block, skip, *weight)
    assert calls.names == expected
    assert y.shape == (tokens, 72)


def test_a_cpu_tensor_gets_aten() -> None:
    p = problem(1, 192, 72, 3, 64, rank=4, block=64)
    with _Calls() as calls:
        torch.ops.lopro.packed_site(*p.args())
    assert calls.names == []


def test_fp64_is_left_to_aten() -> None:
    assert not dispatch.runs_triton(torch.empty(1, dtype=torch.float64))
