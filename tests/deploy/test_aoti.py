from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from torch import nn

import lopro_fx
from lopro_fx.errors import CheckpointError, GraphError
from lopro_fx.kernels import scratch
from lopro_fx.packages.aoti import size_bound
from tests.deploy.models import LanguageModel, export_lm, full_disk, names, quantized_lm, token_ids
from tests.helpers import assert_close
from tests.huggingface.models import case

# Enough weight that a second copy of the embedding (4 MB), or one dense Linear (1 MB) a layer, would show in the size.
SIZES = {"width": 512, "depth": 2, "vocab": 2000}
# Machine code, alignment and the archive of so small a model.
CODE = 700_000
RUN = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save([run(ids) for ids in inputs], sys.argv[3])
assert not any(name.startswith("lopro_fx") for name in sys.modules), "the package needs lopro_fx"
"""


@pytest.fixture(scope="module")
def program():
    return lopro_fx.optimize(quantized_lm(**SIZES))


@pytest.fixture(scope="module")
def package(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aoti")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*written in Python")
        result = lopro_fx.export_aoti(program, folder / "model.pt2")
    assert result.path == folder / "model.pt2"
    assert result.bytes == result.path.stat().st_size
    assert names(folder) == ["model.pt2"], "the compiler's files were left behind"
    return result


def test_package_runs_without_lopro_fx_at_every_size(program, package, tmp_path):
    inputs = [token_ids(batch, length, SIZES["vocab"]) for batch, length in ((1, 1), (3, 5), (2, 40))]
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [str(package.path), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    command = [sys.executable, "-c", RUN, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    module = program.module()
    for ids, got in zip(inputs, torch.load(tmp_path / "outputs.pt", weights_only=True), strict=True):
        with torch.no_grad():
            expected = module(ids)
        assert_close(str(tuple(ids.shape)), expected, got, 1e-5)
        assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_a_packed_head_and_its_embedding_are_stored_once(tmp_path):
    sizes = {**SIZES, "depth": 1, "vocab": 8000}
    torch.manual_seed(0)
    config = lopro_fx.RTN(bits=4, head_bits=8, clip_steps=0)
    program = lopro_fx.quantize(export_lm(LanguageModel(**sizes)), None, config)
    result = lopro_fx.export_aoti(program, tmp_path / "model.pt2")
    table = sizes["vocab"] * sizes["width"]
    assert table > CODE, "a second copy in 8 bits would hide in what is allowed for code"
    assert table < result.bytes < result.bound + CODE < 2 * table
    ids = token_ids(2, 7, sizes["vocab"])
    with torch.no_grad():
        expected = program.module()(ids)
    assert_close("logits", expected, torch._inductor.aoti_load_package(str(result.path))(ids), 1e-5)


def _stored(program):
    """Bytes of every tensor of a program, each once."""
    tensors = (*program.state_dict.values(), *program.constants.values())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def test_package_holds_each_packed_tensor_once(program, package):
    dense = 4 * lopro_fx.report(program).weights
    stored = _stored(program)
    assert stored <= package.bound < 1.05 * stored
    assert dense / 6 > CODE, "one dense Linear would hide in what is allowed for code"
    assert package.bytes < package.bound + CODE
    inside = zipfile.ZipFile(package.path).infolist()
    assert sum(entry.filename.endswith(".so") for entry in inside) == 1
    assert not any(entry.file_size for entry in inside if entry.filename.endswith(".cpp"))


def test_size_bound_counts_tied_weights_once(quantized):
    stored, table = _stored(quantized), quantized.state_dict["embed.weight"].nbytes
    assert quantized.state_dict["head.weight"].data_ptr() == quantized.state_dict["embed.weight"].data_ptr()
    assert stored <= size_bound(quantized) < min(1.05 * stored, stored + table)


def test_a_full_disk_of_temporary_files_is_named(program, tmp_path):
    """A target in a path with a space is compiled elsewhere, and elsewhere may be smaller."""
    with full_disk(20_000), pytest.raises(CheckpointError, match="TMPDIR") as caught:
        lopro_fx.export_aoti(program, tmp_path / "a folder" / "model.pt2")
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "a folder") == []


def test_name_of_the_file(quantized, tmp_path):
    with pytest.raises(CheckpointError, match=r"\.pt2"):
        lopro_fx.export_aoti(quantized, tmp_path / "model.so")


def test_program_without_example_inputs(tmp_path):
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    program._example_inputs = None
    with pytest.raises(GraphError, match="example inputs"):
        lopro_fx.export_aoti(program, tmp_path / "model.pt2")


def test_an_operator_written_in_python_is_named(tmp_path):
    @torch.library.custom_op("lopro_fx_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    program = torch.export.export(Twice(), (torch.ones(1, 2),))
    with pytest.warns(UserWarning, match=r"'twice'.*lopro_fx_test\.twice\.default") as caught:
        lopro_fx.export_aoti(program, tmp_path / "model.pt2")
    assert any(warning.filename == __file__ for warning in caught)


def test_what_can_not_be_compiled_leaves_nothing(tmp_path):
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/compiler",)})
    with no_compiler, pytest.raises(GraphError, match="AOTInductor") as caught:
        lopro_fx.export_aoti(program, tmp_path / "model.pt2")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_the_same_input_gives_the_same_bytes(tmp_path, monkeypatch):
    """The compiler writes the path of what it compiles into libraries and their names."""
    # Another process that compiles has the usual name, and this one would have none.
    monkeypatch.setattr(scratch, "cache_dir", lambda: tmp_path)
    program, tied = lopro_fx.optimize(quantized_lm(depth=1)), case("tied")
    programs = lopro_fx.export_for_generation(tied.model, max_cache_len=16)
    found = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        one = lopro_fx.export_aoti(program, tmp_path / place / f"{place}.pt2")
        two = lopro_fx.package(programs.map(lambda each: lopro_fx.apply(each, tied.state)), tmp_path / f"{place}.pt2")
        found.append((one.path.read_bytes(), two.path.read_bytes()))
    assert found[0] == found[1]
    assert sorted(names(tmp_path)) == ["a", "a.pt2", "b", "b.pt2", "compiling.lock"]
