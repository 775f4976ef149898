"""Operands by name: of every operator of lopro, of those to come, and with an error that says what is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx import Graph, Node

from lopro_fx.errors import GraphError
from lopro_fx.passes.calls import packed_names
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.operands import Operands, operands
from tests.passes.quantised import (
    CPU_SITE,
    PACKED_EMBEDDING,
    PACKED_LINEAR,
    PACKED_SITE,
    PROJECT,
    ROTATE,
    calls,
    quantised,
)

_library = torch.library.Library("lopro", "FRAGMENT")
_library.define("of_tomorrow(Tensor x, Tensor codes, Tensor? codebook=None, int bits=2, *, bool fast=False) -> Tensor")
_library.impl("of_tomorrow", lambda x, *_, **__: x * 1, "CompositeImplicitAutograd")
OF_TOMORROW = torch.ops.lopro.of_tomorrow.default
EVERY = [ROTATE, PROJECT, PACKED_LINEAR, PACKED_SITE, CPU_SITE, PACKED_EMBEDDING, OF_TOMORROW,
         torch.ops.lopro.packed_int8.default]  # fmt: skip


def _node(operator, *args, **kwargs) -> Node:
    graph = Graph()
    with graph.inserting_before():
        args = tuple(graph.placeholder(arg) if isinstance(arg, str) else arg for arg in args)
        kwargs = {name: graph.placeholder(arg) if arg == name else arg for name, arg in kwargs.items()}
    return graph.call_function(operator, args, kwargs)


def _full(operator) -> Node:
    """A call that gives every operand by position, tensors by their names."""
    given = [argument for argument in operator._schema.arguments if not argument.has_default_value()]
    return _node(operator, *[argument.name if "Tensor" in str(argument.type) else 1 for argument in given])


@pytest.mark.parametrize("operator", EVERY, ids=str)
def test_a_call_is_read_and_written_as_it_was(operator) -> None:
    node = _full(operator)
    args, kwargs = node.args, node.kwargs
    call = operands(node)
    assert list(call.named) == [argument.name for argument in operator._schema.arguments]
    assert (call.args, call.kwargs) == (args, kwargs)
    call.write(node)
    assert (node.args, node.kwargs) == (args, kwargs)


def test_operands_are_found_however_they_are_passed() -> None:
    call = operands(_node(OF_TOMORROW, "x", codes="codes", fast=True))
    assert (call.x.name, call.codes.name, call.codebook, call.bits, call.fast) == ("x", "codes", None, 2, True)
    assert call.args == (call.x, call.codes)
    assert call.kwargs == {"fast": True}


def test_changes_by_name() -> None:
    call = operands(_node(OF_TOMORROW, "x", "codes"))
    changed = call.replace(bits=4)
    assert (call.bits, changed.bits, changed.codes) == (2, 4, call.codes)
    assert changed.kwargs == {"bits": 4}


def test_names_that_the_schema_lacks_are_refused() -> None:
    call = operands(_full(PROJECT))
    with pytest.raises(GraphError, match=r"lopro.project.default has no operand 'codes'; it has x, down, scale"):
        _ = call.codes
    with pytest.raises(GraphError, match=r"lopro.project.default has no operand 'bits'"):
        call.replace(bits=4)
    with pytest.raises(GraphError, match=r"lopro.project.default needs the operand 'down'"):
        Operands.of(PROJECT, x=call.x)
    assert Operands.of(PROJECT, x=call.x, down=call.down).scale is None


def test_they_can_be_copied() -> None:
    call = operands(_full(PROJECT))
    assert copy.copy(call) == call


def test_operands_for_another_operator() -> None:
    linear = operands(_full(PACKED_LINEAR))
    with pytest.raises(GraphError, match=r"packed_site.default has no operand 'latent', which lopro.packed_linear"):
        linear.to(PACKED_SITE, block=1, skip=0)
    site = linear.replace(latent=None).to(PACKED_SITE, block=1, skip=0)
    assert (site.codes, site.up_scale, site.perm, site.norm) == (linear.codes, linear.up_scale, None, None)
    assert site.to(CPU_SITE, act_bits=8).act_bits == 8
    with pytest.raises(GraphError, match=r"cpu_site.default has no operand 'residual'"):
        site.replace(residual=linear.x).to(CPU_SITE, act_bits=8)


def test_weights_are_what_is_no_activation_bias_or_norm() -> None:
    assert list(operands(_full(PACKED_LINEAR)).weights) == ["codes", "scales", "zeros", "up", "up_scale"]
    assert list(operands(_full(ROTATE)).weights) == ["perm", "signs"]
    assert list(operands(_full(PACKED_EMBEDDING)).weights) == ["codes", "scales", "zeros"]


def test_tensors_of_a_new_operator_are_packed_and_its_input_is_not() -> None:
    program = quantised()
    editor = ProgramEditor(program)
    node = calls(program, PACKED_LINEAR)[0]
    codebook, x = editor.add_buffer("new.codebook", torch.ones(2)), editor.add_buffer("new.query", torch.ones(2))
    like = editor.by_name[node.name]
    codes = operands(like).codes
    editor.add_operator(like, "new", Operands.of(OF_TOMORROW, x=x, codes=codes, codebook=codebook), like)
    assert packed_names(editor.finish()) == {*packed_names(program), "new.codebook"}
