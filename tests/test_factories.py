"""No tensor of the product is made by process-wide defaults: every factory call names its dtype and device."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lopro_fx
from tests.passes.quantised import run
from tests.programs import decoder, ids
from tests.test_resume import _tensors

ROOT = Path(__file__).parents[1]
# Whose dtype is the default one, or follows from numbers, unless it is named.
FACTORIES = {"zeros", "ones", "empty", "full", "eye", "rand", "randn", "linspace", "logspace", "tensor", "as_tensor",
             "empty_strided", "scalar_tensor", "arange", "randint", "randperm", "hann_window", "normal"}  # fmt: skip


def _calls() -> Iterator[tuple[str, ast.Call]]:
    for folder in ("lopro_fx", "passes", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner = node.func.value
                    if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", node


@pytest.mark.parametrize("setting", ["dtype", "device"])
def test_every_factory_call_names_what_the_process_would_choose(setting: str) -> None:
    calls = list(_calls())
    assert len(calls) > 30, "the search finds nothing"
    nameless = [where for where, call in calls if not any(word.arg == setting for word in call.keywords)]
    assert not nameless, f"they take the {setting} that is the process's default: {', '.join(nameless)}"


@pytest.mark.parametrize("setting", [torch.bfloat16, torch.float64, "inference", "no_grad", "deterministic"], ids=str)
@pytest.mark.parametrize("method", ["lopro", "gptq", "head"])
def test_settings_of_the_process_change_no_bit(setting, method: str, tmp_path: Path) -> None:
    config = {"lopro": lopro_fx.LoPRo(bits=3, group_size=32, rank=2, clip_steps=2, importance="gradient"),
              "gptq": lopro_fx.GPTQ(bits=4, group_size=32, clip_steps=2),
              "head": lopro_fx.RTN(bits=4, group_size=32, head_bits=8)}[method]  # fmt: skip
    _, program = decoder(depth=1)
    program = copy.deepcopy(program)
    plain = lopro_fx.calibrate(program, [ids()], config)
    want = run(lopro_fx.apply(program, plain), ids())
    default, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    mode = {"inference": torch.inference_mode, "no_grad": torch.no_grad}.get(setting, torch.enable_grad)
    try:
        if isinstance(setting, torch.dtype):
            torch.set_default_dtype(setting)
        torch.use_deterministic_algorithms(setting == "deterministic")
        with mode():
            state = lopro_fx.calibrate(program, [ids()], config)
            lopro_fx.save(lopro_fx.apply(program, state), tmp_path / "program")
            lopro_fx.save_state(state, tmp_path / "state")
            loaded = lopro_fx.load(tmp_path / "program")
            optimized = lopro_fx.optimize(loaded)
            got, fast = run(loaded, ids()), run(optimized, ids())
        again = lopro_fx.load_state(tmp_path / "state")
    finally:
        torch.set_default_dtype(default)
        torch.use_deterministic_algorithms(deterministic)
    for made in (state, again):
        tensors = _tensors(made)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in _tensors(plain).items())
        assert all(tensors[name].dtype == tensor.dtype for name, tensor in _tensors(plain).items())
    assert torch.equal(got[0], want[0])
    assert torch.allclose(fast[0], want[0], rtol=1e-4, atol=1e-5)
