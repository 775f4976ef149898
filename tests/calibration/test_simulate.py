"""What calibration feeds forward is what the quantised program computes, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

import lopro_fx
from lopro_fx.calibration import replay
from lopro_fx.passes.record import group_of
from tests.programs import decoder, export, ids

CONFIGS = {
    "rotated, with a branch": lopro_fx.LoPRo(bits=3, group_size=32, rank=2, clip_steps=2),
    "permuted": lopro_fx.GPTQ(bits=3, group_size=32, act_order="column", clip_steps=2),
    "rounded to 8 bits": lopro_fx.LoPRo(bits=3, group_size=32, rank=2, clip_steps=2, act_bits=8),
    "rounded to 4 bits, not rotated": lopro_fx.RTN(bits=4, group_size=32, act_bits=4),
    "rounded by token": lopro_fx.LoPRo(bits=4, group_size=32, rank=0, clip_steps=2, act_bits=8, act_group=-1),
}


class _Inputs(Interpreter):
    """Runs a quantised program and keeps what each group reads, by the group's name."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__(program.module())
        self.found: dict[str, Tensor] = {}
        # The first of lopro's nodes of a group reads the group's input.
        self._groups: dict[str, str] = {}
        for node in program.graph.nodes:
            if getattr(node.target, "namespace", "") == "lopro" and group_of(node) not in self._groups.values():
                self._groups[node.name] = group_of(node)

    def run_node(self, n: Node) -> Any:
        if n.name in self._groups:
            self.found[self._groups[n.name]] = self.fetch_args_kwargs_from_env(n)[0][0]
        return super().run_node(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_group_is_measured_on_what_it_will_read(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = decoder(bias=True)
    program = export(module.to(dtype), ids(), dynamic=True)
    seen: dict[str, Tensor] = {}
    measure = replay.measure

    def recorded(inputs: list[Tensor], group: str, *rest: Any) -> Any:
        seen[group] = inputs[0]
        return measure(inputs, group, *rest)

    monkeypatch.setattr(replay, "measure", recorded)
    quantized = lopro_fx.quantize(program, [ids()], CONFIGS[name])
    runner = _Inputs(quantized)
    with torch.no_grad():
        runner.run(ids())
    assert len(seen) == 8
    for group, x in seen.items():
        assert torch.equal(x, runner.found[group]), group


def test_rounding_of_activations_decides_what_follows() -> None:
    """Later groups are solved for the error that rounding leaves: their codes differ from those without."""
    _, program = decoder(bias=True)
    configs = [lopro_fx.GPTQ(bits=3, group_size=32, act_bits=bits) for bits in (0, 4)]
    states = [lopro_fx.calibrate(program, [ids()], config) for config in configs]
    same = {name: torch.equal(layer.weight.tensors["codes"], states[1].layers[name].weight.tensors["codes"])
            for name, layer in states[0].layers.items()}  # fmt: skip
    assert same["blocks.0.q"]
    assert not same["blocks.1.down"]
