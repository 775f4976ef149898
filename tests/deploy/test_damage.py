"""A folder that is missing, foreign, damaged, or could not be written."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lopro_fx
from lopro_fx.errors import CheckpointError, ConfigError
from lopro_fx.state import state_of
from lopro_fx.store.manifest import VERSION, sha256
from tests.deploy.models import LanguageModel, export_lm, full_disk, names
from tests.mixtures import MixtureDecoder
from tests.programs import export, ids, seeded

FILES = ("lopro_fx.json", "program.json", "record.json", "tensors.safetensors")


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a good folder, to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def _resign(folder, name):
    """Make the manifest agree with a file that was changed on purpose."""
    manifest = json.loads((folder / "lopro_fx.json").read_text())
    manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / "lopro_fx.json").write_text(json.dumps(manifest))


def _refused(folder, match, load=lopro_fx.load):
    with pytest.raises(CheckpointError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path):
    _refused(tmp_path / "none", re.escape(str(tmp_path / "none")))


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    _refused(tmp_path / "file", re.escape(str(tmp_path / "file")))


def test_foreign_folder(stories):
    _refused(stories, re.escape(str(stories)))


def test_foreign_manifest(copied):
    (copied / "lopro_fx.json").write_text('{"format": "something else"}')
    _refused(copied, re.escape(str(copied)))


def test_unknown_version(copied):
    manifest = json.loads((copied / "lopro_fx.json").read_text())
    (copied / "lopro_fx.json").write_text(json.dumps({**manifest, "version": 99}))
    _refused(copied, rf"version 99\b.*version 2 and {VERSION}\b")


def test_program_and_state_are_told_apart(saved):
    _refused(saved, "program.*state", lopro_fx.load_state)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(copied, name):
    (copied / name).unlink()
    _refused(copied, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_file(copied, name, kept):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[: int(kept * len(content))])
    _refused(copied, name)


@settings(max_examples=40)
@given(name=st.sampled_from(FILES[1:]), position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_is_found(saved, tmp_path_factory, name, position, bit):
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("flip") / "copy")
    content = bytearray((folder / name).read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    (folder / name).write_bytes(content)
    _refused(folder, f"{name}.*SHA-256")


def test_missing_tensor(copied):
    tensors = load_file(copied / "tensors.safetensors")
    del tensors["blocks.0.gate.codes"]
    save_file(tensors, copied / "tensors.safetensors")
    _resign(copied, "tensors.safetensors")
    _refused(copied, r"'blocks\.0\.gate\.codes'")


def test_a_weight_of_another_shape_than_was_traced(copied):
    tensors = load_file(copied / "tensors.safetensors")
    tensors["blocks.0.gate.scales"] = tensors["blocks.0.gate.scales"].unsqueeze(-1)
    save_file(tensors, copied / "tensors.safetensors")
    _resign(copied, "tensors.safetensors")
    _refused(copied, r"'blocks\.0\.gate\.scales' is .*, but the program reads")


def test_a_row_of_the_report_of_other_types(copied):
    record = json.loads((copied / "record.json").read_text())
    record["program"]["sites"]["blocks.0.gate"]["shape"][0] = 1e308
    (copied / "record.json").write_text(json.dumps(record))
    _resign(copied, "record.json")
    _refused(copied, r"record\.json is damaged")


@pytest.mark.parametrize(("place", "value"), [(0, -1), (3, 10_000), (5, None)])
def test_a_permutation_that_is_none(quantized, copied, tmp_path, place, value):
    """Kernels gather by it, and would read memory of others."""
    lopro_fx.save_state(state_of(quantized), tmp_path / "state")
    for folder, load in ((copied, lopro_fx.load), (tmp_path / "state", lopro_fx.load_state)):
        tensors = load_file(folder / "tensors.safetensors")
        name = next(name for name in tensors if name.endswith(".perm"))
        tensors[name][place] = tensors[name][place - 1] if value is None else value
        save_file(tensors, folder / "tensors.safetensors")
        _resign(folder, "tensors.safetensors")
        _refused(folder, f"'{re.escape(name)}' is no permutation of", load)


@pytest.mark.parametrize(("operand", "value"), [("bits", 8), ("group_size", 16), ("codes", "scales"), ("up", "codes")])
def test_operands_that_do_not_fit_each_other(copied, operand, value):
    """Kernels of GPUs take sizes from one operand and addresses from another."""
    graph = json.loads((copied / "program.json").read_text())
    node = next(node for node in graph["graph_module"]["graph"]["nodes"] if "packed_linear" in node["target"])
    named = {entry["name"]: entry for entry in node["inputs"]}
    named[operand]["arg"] = {"as_int": value} if isinstance(value, int) else named[value]["arg"]
    (copied / "program.json").write_text(json.dumps(graph))
    _resign(copied, "program.json")
    _refused(copied, r"calls lopro\.packed_linear\.default with")


@pytest.mark.parametrize(("key", "value"), [("skip", 1 << 20), ("skip", -1), ("skip", 0.5), ("block", 3), ("block", 0)])
def test_a_rotation_of_a_state_that_does_not_fit(quantized, tmp_path, key, value):
    lopro_fx.save_state(state_of(quantized), tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    next(iter(record["inputs"].values()))[key] = value
    (tmp_path / "record.json").write_text(json.dumps(record))
    _resign(tmp_path, "record.json")
    _refused(tmp_path, f"with {key} {value}, not", lopro_fx.load_state)


@pytest.mark.parametrize(("rows", "strip"), [(1 << 40, 32), (1 << 31, 1), (64, 0)])
def test_a_trellis_that_no_memory_holds(tmp_path, rows, strip):
    """Strips are counted, not listed."""
    config = lopro_fx.RTN(bits=2, format="trellis", window=12, strip=32)
    lopro_fx.save_state(lopro_fx.calibrate(export_lm(LanguageModel(depth=1)), None, config), tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    layer = next(iter(record["layers"].values()))
    layer["shape"][0], layer["spec"]["strip"] = rows, strip
    (tmp_path / "record.json").write_text(json.dumps(record))
    _resign(tmp_path, "record.json")
    with pytest.raises((CheckpointError, ConfigError), match=r"strip=|but its layer has"):
        lopro_fx.load_state(tmp_path)


def test_an_index_that_is_computed(tmp_path):
    """It has the shape that the file says, and no values to check."""
    program = export_lm(LanguageModel(depth=1))
    quantised = lopro_fx.quantize(
        program, None, lopro_fx.LoPRo(bits=4, group_size=32, transforms=("partial",), salient=8)
    )
    node = next(node for node in quantised.graph.nodes if node.target is torch.ops.lopro.rotate.default)
    perm = node.args[1]
    with quantised.graph.inserting_before(node):
        moved = quantised.graph.call_function(torch.ops.aten.add.Tensor, (perm, 1000))
    moved.meta["val"] = perm.meta["val"]
    node.update_arg(1, moved)
    quantised.graph_module.recompile()
    lopro_fx.save(quantised, tmp_path)
    _refused(tmp_path, r"calls lopro\.rotate\.default with perm that is computed")


class _Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x):
        y = torch.cond(
            x.sum() > 0, lambda x: torch.ops.lopro.rotate(x, None, None, 32, 0).sum(), lambda x: x.sum(), (x,)
        )
        return self.linear(x) + y


@pytest.mark.parametrize("skip", [0, 1000])
def test_operators_of_a_branch(tmp_path, skip):
    program = torch.export.export(_Branches().eval(), (torch.randn(4, 64),))
    lopro_fx.save(lopro_fx.quantize(program, None, lopro_fx.RTN(bits=4, group_size=32)), tmp_path)
    graph = json.loads((tmp_path / "program.json").read_text())
    node = _holder(graph, "torch.ops.lopro.rotate.default")
    next(entry for entry in node["inputs"] if entry["name"] == "skip")["arg"]["as_int"] = skip
    (tmp_path / "program.json").write_text(json.dumps(graph))
    _resign(tmp_path, "program.json")
    if skip:
        _refused(tmp_path, r"calls lopro\.rotate\.default with skip 1000")
    else:
        lopro_fx.load(tmp_path)


def _holder(value, target):
    """The node that calls `target`, in a graph or one inside it."""
    if isinstance(value, dict):
        if value.get("target") == target:
            return value
        value = list(value.values())
    if isinstance(value, list):
        return next((found for item in value if (found := _holder(item, target)) is not None), None)
    return None


@pytest.mark.parametrize("value", [-1, 1000])
def test_places_outside_of_the_grid_of_experts(tmp_path, value):
    program = export(seeded(MixtureDecoder()), ids(2, 9), dynamic=True)
    config = lopro_fx.TileQ(bits=4, group_size=32, tile_rank=4)
    state = lopro_fx.calibrate(program, [ids(4, 16)], config)
    lopro_fx.save_state(state, tmp_path / "state")
    lopro_fx.save(lopro_fx.apply(program, state), tmp_path / "program")
    for folder, load in ((tmp_path / "state", lopro_fx.load_state), (tmp_path / "program", lopro_fx.load)):
        tensors = load_file(folder / "tensors.safetensors")
        name = next(name for name in tensors if name.endswith("cells"))
        tensors[name][0, 1] = value
        save_file(tensors, folder / "tensors.safetensors")
        _resign(folder, "tensors.safetensors")
        _refused(folder, f"'{re.escape(name)}' has places outside of a grid of", load)


def test_a_tensor_of_a_state_of_another_shape(quantized, tmp_path):
    lopro_fx.save_state(state_of(quantized), tmp_path)
    tensors = load_file(tmp_path / "tensors.safetensors")
    tensors["blocks.0.gate.codes"] = tensors["blocks.0.gate.codes"][:-1].contiguous()
    save_file(tensors, tmp_path / "tensors.safetensors")
    _resign(tmp_path, "tensors.safetensors")
    _refused(tmp_path, r"'blocks\.0\.gate\.codes' is .*, but its layer has", lopro_fx.load_state)


def test_program_of_another_schema(copied):
    graph = json.loads((copied / "program.json").read_text())
    graph["schema_version"]["major"] += 100
    (copied / "program.json").write_text(json.dumps(graph))
    _resign(copied, "program.json")
    _refused(copied, re.escape(f"torch {torch.__version__}"))


def test_folder_of_another_owner_is_not_replaced(quantized, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "theirs"))):
        lopro_fx.save(quantized, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "years of work"


def test_own_folder_is_replaced(quantized, copied):
    (copied / "notes").write_text("mine")
    before = (copied / "program.json").stat().st_ino
    lopro_fx.save(quantized, copied)
    assert (copied / "program.json").stat().st_ino != before
    assert names(copied) == sorted((*FILES, "notes"))
    assert names(copied.parent) == ["copy"]


@pytest.mark.parametrize("limit", [1 << 10, 50 << 10])
def test_full_disk_leaves_nothing(quantized, tmp_path, limit):
    with full_disk(limit), pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "out"))) as caught:
        lopro_fx.save(quantized, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_full_disk_leaves_the_old_folder_as_it_was(quantized, copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with full_disk(50 << 10), pytest.raises(CheckpointError):
        lopro_fx.save(quantized, copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert names(copied.parent) == ["copy"]


def test_damaged_state(tmp_path):
    torch.manual_seed(0)
    state = lopro_fx.calibrate(export_lm(LanguageModel(depth=1)), None, lopro_fx.RTN(bits=4, group_size=32))
    lopro_fx.save_state(state, tmp_path / "state")
    _refused(tmp_path / "state", "state.*program")
    content = bytearray((tmp_path / "state" / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "state" / "tensors.safetensors").write_bytes(content)
    _refused(tmp_path / "state", r"tensors\.safetensors", lopro_fx.load_state)


def test_unsupported_example_inputs(tmp_path):
    class Identity(torch.nn.Module):
        def forward(self, x, limits):
            return x + 1

    program = torch.export.export(Identity(), (torch.ones(2), torch.Size([3])))
    with pytest.raises(CheckpointError, match=r"example inputs.*\bSize\b"):
        lopro_fx.save(program, tmp_path / "out")
    assert names(tmp_path) == []


def test_program_without_data_is_refused(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2, device="meta"), (torch.ones(1, 2, device="meta"),))
    with pytest.raises(CheckpointError, match=r"weight.*data"):
        lopro_fx.save(program, tmp_path / "out")
