"""A folder made to run code when it is loaded: every way that torch's reader offers is closed."""

from __future__ import annotations

import contextlib
import json
import re
import shutil

import pytest
import torch

import lopro_fx
from lopro_fx.errors import CheckpointError
from lopro_fx.store.manifest import sha256
from lopro_fx.store.operators import is_allowed


def _first(value, key):
    """The innermost mapping that holds `key`, found anywhere in a JSON value."""
    if isinstance(value, dict):
        if key in value:
            return value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            if (found := _first(item, key)) is not None:
                return found
    return None


def _call(graph):
    return graph["graph_module"]["graph"]["nodes"][0]


def _signature(graph):
    return graph["graph_module"]["module_call_graph"][0]["signature"]


def _tree(kind, context):
    leaf = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])


def _expression(graph, code):
    _first(graph, "expr_str")["expr_str"] = code


def _guard(graph, code):
    graph["guards_code"] = [code]


def _target(graph, code):
    _call(graph)["target"] = code


def _node_name(graph, code):
    _call(graph)["name"] = code


def _argument_name(graph, code):
    _call(graph)["inputs"][0]["name"] = code


def _input_name(graph, code):
    _signature(graph)["forward_arg_names"] = [code]


def _weight_name(graph, code):
    _first(graph, "parameter_name")["parameter_name"] = code


def _structure(graph, code):
    _signature(graph)["in_spec"] = code


ENUM = json.dumps({"__enum__": True, "fqn": "antigravity:X", "name": "X"})
FACTORY = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
SYSTEM = "__import__('os').system('touch {marker}')"
ATTACKS = {
    "expression": (_expression, SYSTEM),
    "expression of a name": (_expression, "Lambda"),
    "expression with a string": (_expression, "Symbol('x; import os')"),
    "expression with an attribute": (_expression, "Integer(1).__class__"),
    # They would be computed for ever.
    "tower of powers": (_expression, "9**9**9**9"),
    "power of a power": (_expression, "Pow(Pow(Integer(9), Integer(60)), Integer(60))"),
    "power of a power in a product": (_expression, "(2 * 9**60)**60"),
    "large power": (_expression, "Pow(Integer(2), Integer(10000000))"),
    "shift": (_expression, "1 << 1000000000"),
    "power by a size": (_expression, "2**Symbol('s')"),
    "power without operands": (_expression, "Pow(x=1)"),
    "comparisons of many": (
        _expression,
        "Max(" + ", ".join(f"Min(Symbol('s{i}'), Symbol('t'))" for i in range(20)) + ")",
    ),
    "long product": (_expression, "Mul(" + ", ".join(f"Add(Symbol('s'), Integer({i}))" for i in range(400)) + ")"),
    "guard": (_guard, SYSTEM),
    "guard that closes the call": (_guard, "True, ''), " + SYSTEM + ", (1"),
    "guard on torch": (_guard, "torch.load('{marker}')"),
    "guard with a comprehension": (_guard, "[x for x in L['x']]"),
    "target": (_target, "torch.os.system"),
    "target through an operator": (_target, "torch.ops.load_library.__globals__"),
    "target in operator": (_target, "_operator.methodcaller"),
    "target that is a namespace": (_target, "torch.ops.aten.add"),
    "unknown operator": (_target, "torch.ops.nowhere.op.default"),
    "extension": (_target, "#ns:op"),
    "operator that maps a file": (_target, "torch.ops.aten.from_file.default"),
    "operator that trusts its operands": (_target, "torch.ops.aten._sparse_coo_tensor_unsafe.default"),
    "launch of a kernel": (_target, "torch.ops.lopro.dequantize_device.default"),
    "node name": (_node_name, "x; import os"),
    "argument name": (_argument_name, "x=1, y"),
    "input name": (_input_name, "x=" + SYSTEM),
    "weight name": (_weight_name, 'a"), ' + SYSTEM + ', ("'),
    "weight name that escapes a quote": (_weight_name, "a\\"),
    "weight name of two lines": (_weight_name, "a\nimport os"),
    "enum": (_structure, _tree("builtins.dict", f"[{ENUM}]")),
    "default factory": (_structure, _tree("collections.defaultdict", FACTORY)),
    "key": (_structure, _tree("builtins.dict", json.dumps(["x'):pass"]))),
    "no structure": (_structure, "nonsense"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_folder_that_carries_code_is_refused(saved, tmp_path, attack):
    folder = shutil.copytree(saved, tmp_path / "copy")
    marker = tmp_path / "executed"
    change, code = ATTACKS[attack]
    graph = json.loads((folder / "program.json").read_text())
    change(graph, code.replace("{marker}", str(marker)))
    (folder / "program.json").write_text(json.dumps(graph))
    manifest = json.loads((folder / "lopro_fx.json").read_text())
    manifest["files"]["program.json"] = {
        "bytes": (folder / "program.json").stat().st_size,
        "sha256": sha256(folder / "program.json"),
    }
    (folder / "lopro_fx.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"program\.json") as caught:
        lopro_fx.load(folder)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_expression_would_have_been_executed_by_torch(saved, tmp_path):
    """Why there is something to check: without it, reading the file is running it."""
    from lopro_fx.passes import serde

    marker = tmp_path / "executed"
    graph = json.loads((saved / "program.json").read_text())
    _expression(graph, SYSTEM.replace("{marker}", str(marker)))
    # Whatever torch makes of the result.
    with contextlib.suppress(Exception):
        serde.program_from_json(graph, {}, {}, None)
    assert marker.exists(), "torch no longer evaluates shape expressions: vetting.py can be shorter"


class _Calls(torch.nn.Module):
    """A Linear, and beside it one call of `function`."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = torch.nn.Linear(64, 64), function

    def forward(self, x):
        return self.linear(x) + self.function(x)


@torch.library.custom_op("vetting_test::shift", mutates_args=())
def _shift(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@_shift.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


FOREIGN = {
    "aten.set_.source_Tensor": lambda x: torch.ops.aten.set_(x.clone(), x.clone()),
    "aten.resize_.default": lambda x: x.clone().resize_(4, 64),
    "vetting_test.shift.default": torch.ops.vetting_test.shift,
    # They believe strides, lengths and indices, and end the process.
    "aten._reshape_alias.default": lambda x: torch.ops.aten._reshape_alias(x, [4, 64], [64, 1]),
    "aten.segment_reduce.default": lambda x: torch.ops.aten.segment_reduce(
        x, "sum", lengths=torch.ones(4, dtype=torch.int64), axis=0, unsafe=True
    ),
    "aten.embedding_dense_backward.default": lambda x: torch.ops.aten.embedding_dense_backward(
        x, (x[:, 0] * 0).to(torch.int64), 4, -1, True
    ),
}
ORDINARY = {
    "max": lambda x: x / x.max(),
    "min": lambda x: x - x.min(),
    "randn_like": torch.randn_like,
    "view as integers": lambda x: x.view(torch.int32).to(torch.float32),
    "shift": lambda x: ((x.int() << 2) >> 1).float(),
    "cummax": lambda x: x.cummax(0).values,
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "fft": lambda x: torch.fft.rfft(x).abs().sum(1, keepdim=True),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0],
}


@pytest.mark.parametrize("name", ["native_batch_norm", "_scaled_dot_product_flash_attention_for_cpu", "_fft_c2c"])
def test_operators_that_compute_with_operands_that_do_not_fit_need_trust(name):
    assert not is_allowed(getattr(torch.ops.aten, name).default)


@pytest.mark.parametrize("name", ORDINARY)
def test_operators_that_models_are_computed_with_need_no_trust(name, tmp_path):
    program = torch.export.export(_Calls(ORDINARY[name]).eval(), (torch.randn(4, 64),))
    quantised = lopro_fx.quantize(program, config=lopro_fx.RTN(bits=4, group_size=32))
    lopro_fx.save(quantised, tmp_path)
    lopro_fx.load(tmp_path)


@pytest.mark.parametrize("name", FOREIGN)
def test_operators_that_models_are_not_computed_with_need_trust(name, tmp_path):
    x = torch.randn(4, 64)
    program = torch.export.export(_Calls(FOREIGN[name]).eval(), (x,))
    program = lopro_fx.quantize(program, config=lopro_fx.RTN())
    with pytest.warns(UserWarning, match=f"the program calls {re.escape(name)}: it will load with trust="):
        lopro_fx.save(program, tmp_path / "program")
    with pytest.raises(CheckpointError, match=rf"program\.json calls {re.escape(name)}, .*trust=\['{name}'\]"):
        lopro_fx.load(tmp_path / "program")
    loaded = lopro_fx.load(tmp_path / "program", trust=[name])
    assert torch.equal(loaded.module()(x), program.module()(x))
