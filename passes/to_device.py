"""Move a program to another device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from lopro_fx.passes import compat
from lopro_fx.passes.ties import identity


def to_device(program: ExportedProgram, device: torch.device) -> ExportedProgram:
    """A copy of `program` on `device`, or `program` itself if all of it is there; tied tensors stay tied."""
    if device.type == "cuda" and device.index is None:
        # Tensors have an index, and a program's assertions about their device compare it.
        device = torch.device("cuda", torch.cuda.current_device())
    values = [*program.state_dict.values(), *program.constants.values()]
    if all(value.device == device for value in values if isinstance(value, Tensor)):
        return program
    moved = {identity(value): value.to(device) for value in values if isinstance(value, Tensor)}
    state = {name: _like(value, moved[identity(value)]) for name, value in program.state_dict.items()}
    constants = {name: _like(value, moved[identity(value)]) if isinstance(value, Tensor) else value
                 for name, value in program.constants.items()}  # fmt: skip
    graph_module = compat.copied(program.graph_module)
    # torch's pass works in place and would untie tensors as it moves them; these are moved already.
    return move_to_device_pass(compat.rebuild(program, graph_module, program.graph_signature, state, constants), device)


def _like(old: Tensor, moved: Tensor) -> Tensor:
    return torch.nn.Parameter(moved, old.requires_grad) if isinstance(old, torch.nn.Parameter) else moved
