"""The lockstep runner computes what the eager model computes, holds no more than it must, and names what fails."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional
from torch.utils import _pytree as pytree

from lopro_fx.calibration.batches import flatten_batches
from lopro_fx.calibration.runner import LockstepRunner
from lopro_fx.errors import CalibrationError
from lopro_fx.passes.inline import InlineModesPass
from lopro_fx.passes.sites import find_sites
from tests.helpers import assert_close
from tests.programs import VOCAB, WIDTH, Cached, Nested, Scaled, Twice, decoder, export, ids, rows, seeded

Batch = tuple[tuple, dict]


def _note(first: dict[str, Tensor], name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    first.setdefault(name, inputs[0].clone())


def _seen(module: nn.Module, batches: list[Batch]) -> dict[str, list[Tensor]]:
    """Every Linear's first input in each batch, from hooks on the eager model."""
    seen: dict[str, list[Tensor]] = {}
    for args, kwargs in batches:
        first: dict[str, Tensor] = {}
        hooks = [child.register_forward_pre_hook(partial(_note, first, name)) for name, child in module.named_modules()
                 if isinstance(child, nn.Linear)]  # fmt: skip
        with torch.no_grad():
            module(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        for name, value in first.items():
            seen.setdefault(name, []).append(value)
    return seen


def _stops(program: ExportedProgram, batches: list[Batch]) -> dict[str, list[Tensor]]:
    """What the runner hands out at the first use of every site."""
    sites = {site.nodes[0]: site for site in find_sites(program, keep=False).sites}
    runner = LockstepRunner(program, flatten_batches(program, batches))
    with torch.no_grad():
        return {sites[node].name: list(inputs) for node, inputs in runner.stops(set(sites))}


def _compare(module: nn.Module, program: ExportedProgram, batches: list[Batch], count: int) -> None:
    got, expected = _stops(program, batches), _seen(module, batches)
    assert len(got) == count
    for name, inputs in got.items():
        for index, (have, want) in enumerate(zip(inputs, expected[name], strict=True)):
            assert_close(f"{name}, batch {index}", want, have, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_inputs_of_every_linear_equal_those_of_the_eager_model(tied: bool) -> None:
    module, program = decoder(tied=tied, bias=True)
    batches = [((ids(1, 4),), {}), ((ids(3, 11, 1),), {}), ((ids(2, 1, 2),), {})]
    _compare(module, program, batches, 15)


def test_a_module_used_twice_stops_at_its_first_use() -> None:
    module = seeded(Twice())
    _compare(module, export(module, rows(4)), [((rows(4, seed=i),), {}) for i in range(2)], 2)


def test_several_inputs() -> None:
    module = seeded(Scaled())
    batches = [
        (((rows(4, seed=i), rows(4, seed=i + 1)),), {"mask": rows(4, seed=i + 2), "bias": rows(1)}) for i in range(2)
    ]
    _compare(module, export(module, *batches[0][0], **batches[0][1]), batches, 1)


@pytest.mark.parametrize("autocast", [None, False, True])
def test_nested_graphs_run_in_place_and_inlined(autocast: bool | None) -> None:
    module = seeded(Nested(autocast))
    program = export(module, rows(4))
    batches = [((rows(4, seed=i),), {}) for i in range(2)]
    _compare(module, program, batches, 2)
    _compare(module, InlineModesPass()(program), batches, 2 if autocast else 3)


def test_a_cache_is_private_to_each_batch_and_stays_clean() -> None:
    module = seeded(Cached())
    program = export(module, rows(4))
    batches = [((rows(4, seed=i),), {}) for i in range(3)]
    got = _stops(program, batches)
    for index, ((x,), _) in enumerate(batches):
        assert_close(f"batch {index}", torch.tanh(module.key(x)), got["out"][index], 1e-5)
    assert not program.constants["cache"].any()
    assert not program.constants["cache"].requires_grad


def test_replaced_weights_feed_what_follows() -> None:
    module, program = decoder()
    by_name = {site.name: site for site in find_sites(program).sites}
    site = by_name["blocks.0.o"]
    changed = torch.randn(site.out_features, site.in_features) * 0.3
    runner = LockstepRunner(program, [[ids()]])
    with torch.no_grad():
        for node, inputs in runner.stops({s.nodes[0] for s in by_name.values()}):
            if node is site.nodes[0]:
                runner.replaced[node] = lambda x, bias: functional.linear(x, changed, bias)
            last = inputs[0]
        module.blocks[0].o.weight.copy_(changed)
        expected = _seen(module, [((ids(),), {})])["blocks.1.down"][0]
    assert_close("input of the last Linear", expected, last, 1e-5)


def test_values_are_dropped_after_their_last_use() -> None:
    _, program = decoder()
    sites = find_sites(program).sites
    runner = LockstepRunner(program, [[ids()], [ids(3, 5)]])
    held: list[weakref.ref[Tensor]] = []
    with torch.no_grad():
        for _, inputs in runner.stops({site.nodes[0] for site in sites}):
            held += [weakref.ref(value) for value in inputs]
            del inputs
        gc.collect()
        # q, k and v read one tensor and so do gate and up: four tensors a block, of which the last two stops' may live.
        assert sum(ref() is not None for ref in held) <= 2


def test_what_no_input_reaches_is_computed_once() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("base", torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.cos(self.base * 3)) + self.linear(x)

    program = export(seeded(Positions()), rows(4))
    (site,) = find_sites(program).sites
    ((_, inputs),) = LockstepRunner(program, [[rows(4)], [rows(4)]]).stops({site.nodes[0]})
    assert inputs[0] is inputs[1]
    assert_close("cos", torch.full((WIDTH,), 3.0).cos(), inputs[0], 1e-6)


def test_ids_of_another_tokenizer_are_reported() -> None:
    _, program = decoder()
    bad = ids()
    bad[1, 2] = VOCAB + 7
    with pytest.raises(CalibrationError, match=rf"batch 1.*'embedding'.*\b{VOCAB + 7}\b.*\b{VOCAB} rows"):
        _stops(program, [((ids(),), {}), ((bad,), {})])


class _Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.ones(5, WIDTH))

    def forward(self, where: Tensor) -> Tensor:
        return self.linear(self.table[where])


def test_a_node_that_fails_is_named() -> None:
    program = export(seeded(_Indexed()), torch.tensor([0, 4]))
    with pytest.raises(CalibrationError, match=r"'index'.*aten\.index\.Tensor") as caught:
        _stops(program, [((torch.tensor([0, 9]),), {})])
    assert "\n" not in str(caught.value)


class _Written(nn.Module):
    """Writes to an input, as models with a cache of the caller's do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        total.add_(x)
        return self.linear(total)


def test_inputs_that_a_graph_writes_to_stay_as_they_were() -> None:
    batch = torch.ones(3, 8), torch.zeros(3, 8)
    program = torch.export.export(_Written(), batch, strict=False)
    runners = [LockstepRunner(program, [batch]) for _ in range(2)]
    first, second = (runner.outputs()[0] for runner in runners)
    assert not batch[1].any()
    assert torch.equal(pytree.tree_leaves(first)[-1], pytree.tree_leaves(second)[-1])
