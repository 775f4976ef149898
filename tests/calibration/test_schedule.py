"""The walk over groups: what each is measured on, with and without feeding quantised results forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lopro_fx.calibration.replay import Replay
from lopro_fx.calibration.runner import LockstepRunner
from lopro_fx.errors import CalibrationError
from lopro_fx.methods.base import Context
from lopro_fx.methods.observers import Statistics
from lopro_fx.passes.sites import find_sites
from tests.guests import Multiplied
from tests.helpers import assert_close, gram_of
from tests.programs import decoder, export, ids


@pytest.fixture
def case():
    return decoder(bias=True)


def _run(program, sequential: bool, batches: list[list[Tensor]] | None, **options) -> dict[str, Statistics]:
    """What a method was given that halves every weight."""
    method = Multiplied(factor=0.5, sequential=sequential, **options)
    replay = Replay(program, find_sites(program).groups, batches, method, None, torch.device("cpu"))
    for unit, seen in replay.units():
        replay.install(method.solve(unit, seen, Context(torch.device("cpu"), torch.Generator())))
    return method.given


def test_every_group_is_solved_once_in_graph_order(case) -> None:
    _, program = case
    given = _run(program, True, [[ids()], [ids(3, 5)]])
    assert list(given) == [f"blocks.{i}.{name}" for i in range(2) for name in ("q", "o", "gate", "down")]
    assert {stats.tokens for stats in given.values()} == {2 * 9 + 3 * 5}


@pytest.mark.parametrize("sequential", [True, False])
def test_sequential_feeds_results_forward_and_the_other_does_not(case, sequential: bool) -> None:
    module, program = case
    given = _run(program, sequential, [[ids()]])
    seen: list[Tensor] = []
    if sequential:
        with torch.no_grad():
            for block in module.blocks:
                for name in ("q", "k", "v", "o", "gate", "up", "down"):
                    getattr(block, name).weight.mul_(0.5)
    hook = module.blocks[1].down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        module(ids())
    hook.remove()
    x = seen[0].flatten(0, 1)
    assert_close("magnitude", x.abs().mean(0), given["blocks.1.down"].magnitude, 1e-5)


@pytest.mark.parametrize("clip", [0, 1.0])
def test_the_config_decides_how_far_large_tokens_count(case, clip: float) -> None:
    _, program = case
    seen = {}
    groups, batch = find_sites(program).groups, ids()
    stats = _run(program, False, [[batch]], token_clip=clip)
    for node, (x,) in LockstepRunner(program, [[batch]]).stops({group.sites[0].nodes[0] for group in groups}):
        seen[node] = x
    clipped = 0
    for group in groups:
        rows = seen[group.sites[0].nodes[0]].flatten(0, -2)
        norm = rows.square().sum(1)
        limit = clip * norm.median() if clip else norm.max()
        clipped += int((norm > limit).sum())
        rows = rows * (limit / norm).clamp_max(1).sqrt().unsqueeze(1)
        assert_close(group.name, gram_of(rows), stats[group.name].gram, 1e-5)
    assert (clipped > 0) == (clip > 0)


def test_the_program_is_not_changed(case) -> None:
    _, program = case
    before = {name: value.clone() for name, value in program.state_dict.items()}
    code = program.graph_module.code
    _run(program, True, [[ids()]])
    assert program.graph_module.code == code
    assert all(torch.equal(program.state_dict[name], value) for name, value in before.items())


def test_without_data_nothing_runs(case) -> None:
    _, program = case
    given = _run(program, True, None)
    assert len(given) == 8
    assert all(stats.tokens == 0 and torch.equal(stats.gram, torch.eye(len(stats.gram))) for stats in given.values())


def test_an_activation_that_is_not_finite_names_node_and_layer() -> None:
    module, _ = decoder(bias=True)
    module.blocks[1].norm.weight.data[3] = torch.inf
    program = export(module, ids(), dynamic=True)
    with pytest.raises(CalibrationError, match=r"'layer_norm_2'.*'blocks\.1\.q'.*batch 0"):
        _run(program, True, [[ids()]])
