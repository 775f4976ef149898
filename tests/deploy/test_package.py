"""One quantised model, five ways to generate: eager, package, package without lopro_fx, C++, transformers."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lopro_fx
from lopro_fx.errors import CheckpointError, ConfigError
from lopro_fx.models import export_causal_lm
from lopro_fx.packages import processor
from lopro_fx.packages.aoti import compile_program
from lopro_fx.packages.package import read_manifest
from lopro_fx.passes import compat
from tests.deploy.models import full_disk, names
from tests.helpers import assert_close, generator
from tests.hostile.child import outcome
from tests.hostile.mutate import ACCIDENTS, mutant
from tests.models.test_generation import greedy

VOCAB, NEW, CACHE = 500, 64, 96
MANIFEST = "extra/lopro_fx.json"
PROMPT = [17, 301, 44, 9, 260, 78, 3]
EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
# What someone writes who has torch and the package, and nothing of ours.
RUN = """
import json, sys, torch
from torch.export.pt2_archive._package import load_pt2
path, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
contents = load_pt2(path, load_weights_from_disk=True)
cache = json.loads(contents.extra_files["lopro_fx.json"])["cache"]
bits = cache["bits"]
columns, dtype = (lambda width: width * bits // 8 + 5, torch.uint8) if bits else (int, torch.float32)
keys, values = ([torch.zeros(1, heads, cache["max_cache_len"] + 1, columns(width), dtype=dtype)
                 for heads, width in cache[name]] for name in ("keys", "values"))
ids, position, tokens = torch.tensor([prompt]), 0, []
for name in ["prefill"] + ["decode"] * (count - 1):
    slots = torch.arange(max(position + ids.shape[1], 2))
    logits = contents.aoti_runners[name](ids, torch.tensor([position]), torch.zeros(1, dtype=torch.int64), slots,
                                         keys, values)
    position += ids.shape[1]
    ids = logits.argmax(-1, keepdim=True)
    tokens.append(ids.item())
assert not any(module.startswith("lopro_fx") for module in sys.modules), "the package needs lopro_fx"
print(json.dumps(tokens))
"""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    # Weights of 1 leave rows of the 8-bit table small integers times a scale, and some of their ratios lie on the edge
    # of two int8 codes: the last bit of a sum would decide.
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.fixture(scope="module", params=["affine", "trellis"])
def state(model, request):
    ids = torch.randint(3, VOCAB, (4, 32), generator=generator())
    settings = {"affine": {"group_size": 32}, "trellis": {"window": 12, "strip": 32}}[request.param]
    config = lopro_fx.LoPRo(format=request.param, bits=3, rank=4, refits=0, head_bits=8, **settings)
    return lopro_fx.calibrate(export_causal_lm(model), [(ids,)], config)


@pytest.fixture(scope="module")
def programs(model, state):
    bits = 8 if state.config["format"] == "trellis" else 0
    plain = lopro_fx.export_for_generation(model, max_cache_len=CACHE, cache_bits=bits)
    return plain.map(lambda program: lopro_fx.apply(program, state))


@pytest.fixture(scope="module")
def packaged(programs, tmp_path_factory):
    return lopro_fx.package(programs, tmp_path_factory.mktemp("package") / "model.pt2")


@pytest.fixture(scope="module")
def eager(programs):
    """The optimised programs in eager mode."""
    fast = programs.map(lambda program: lopro_fx.optimize(program, target="cpu", activations="int8"))
    return lopro_fx.Generator.from_programs(fast)


@pytest.fixture(scope="module")
def expected(eager):
    """What the optimised programs give in eager mode."""
    return greedy(eager, torch.tensor([PROMPT]), None, NEW)[0].tolist()


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is absent")
    folder = tmp_path_factory.mktemp("cpp")
    configure = ["cmake", "-S", str(EXAMPLE), "-B", str(folder), f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if torch.version.cuda and "uses CUDA but I cannot find the CUDA" in done.stderr:
            pytest.skip("a CUDA build of torch needs the CUDA toolkit to be linked against")
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "generate"


def test_the_tokens_are_no_repetition(expected):
    assert len(set(expected)) > 8


def test_loaded_package(packaged, expected):
    run = lopro_fx.load_package(packaged.path)
    assert greedy(run, torch.tensor([PROMPT]), None, NEW)[0].tolist() == expected
    # A second text on the same cache.
    assert greedy(run, torch.tensor([PROMPT]), None, NEW)[0].tolist() == expected


def test_process_without_lopro_fx(packaged, expected, tmp_path):
    command = [sys.executable, "-c", RUN, str(packaged.path), str(PROMPT), str(NEW)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(expected)


def test_cpp_program(packaged, expected, binary):
    done = subprocess.run(
        [binary, packaged.path, str(NEW)], input=" ".join(map(str, PROMPT)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == expected


def test_transformers(model, state, tmp_path):
    # Whose cache is not rounded.
    plain = lopro_fx.export_for_generation(model, max_cache_len=CACHE)
    fast = plain.map(
        lambda program: lopro_fx.optimize(lopro_fx.apply(program, state), target="cpu", activations="int8")
    )
    expected = greedy(lopro_fx.Generator.from_programs(fast), torch.tensor([PROMPT]), None, NEW)[0].tolist()
    lopro_fx.save_pretrained(model, state, tmp_path / "model", activations="int8")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([PROMPT])
    out = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert out[0, len(PROMPT) :].tolist() == expected


def test_logits_are_those_of_the_optimised_programs(eager, packaged):
    ids = torch.randint(3, VOCAB, (1, 20), generator=generator(2))
    run = lopro_fx.load_package(packaged.path)
    eager.reset()
    # An activation half-way between two integers may go either way, which so random a model turns into a hundredth.
    assert_close("prefill", eager.prefill(ids[:, :18]), run.prefill(ids[:, :18]), 2e-2)
    assert_close("decode", eager.decode(ids[:, 18:19]), run.decode(ids[:, 18:19]), 2e-2)


def test_weights_are_stored_once(programs, packaged):
    with zipfile.ZipFile(packaged.path) as archive:
        weights = [info.file_size for info in archive.infolist() if "/data/weights/" in info.filename]
    tensors = {tensor.data_ptr(): tensor for tensor in (*programs.decode.state_dict.values(),
                                                        *programs.decode.constants.values())}  # fmt: skip
    # Each is a torch.save file of its own, of some 1.2 kB beside the tensor.
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert stored <= sum(weights) < stored + 1600 * len(weights)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_truncated_package(packaged, binary, tmp_path, part):
    data = packaged.path.read_bytes()
    path = tmp_path / "cut.pt2"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        lopro_fx.load_package(path)
    done = subprocess.run([binary, path, "3"], input="5 6", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")


def test_changed_byte(packaged, tmp_path):
    data = bytearray(packaged.path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "changed.pt2").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"changed\.pt2"):
        lopro_fx.load_package(tmp_path / "changed.pt2")


def _contents(path: Path) -> dict[str, bytes]:
    """Members of a package, by their names inside its folder."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def _write(path: Path, contents: Mapping[str, bytes], manifest: Any = None) -> Path:
    """Write a package whose CRCs are right, with another manifest if one is given."""
    text = {} if manifest is None else {MANIFEST: json.dumps(manifest).encode()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**contents, **text}.items():
            archive.writestr(f"model/{name}", content)
    return path


def _sealed(path: Path, contents: Mapping[str, bytes]) -> Path:
    """Write a package whose hashes are right too."""
    members = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items() if name != MANIFEST}
    return _write(path, contents, {**json.loads(contents[MANIFEST]), "members": members})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and limits a child's memory")
def test_accidents(packaged, expected, tmp_path):
    """A clear error or the same tokens, in a child whose time and memory are limited."""
    (tmp_path / "good").mkdir()
    shutil.copy(packaged.path, tmp_path / "good" / "model.pt2")
    rng = random.Random(7)

    def read(folder: Path) -> list[int]:
        loaded = lopro_fx.load_package(folder / "model.pt2")
        return greedy(loaded, torch.tensor([PROMPT]), None, 4)[0].tolist()

    assert outcome(lambda: read(tmp_path / "good")).what == expected[:4]
    for number in range(3 * len(ACCIDENTS)):
        mutate = ACCIDENTS[number % len(ACCIDENTS)]
        folder = mutant(tmp_path / "good", tmp_path / "mutant", "model.pt2", mutate, rng.randrange(1 << 30))
        found = outcome(lambda folder=folder: read(folder))
        assert found.kind == "refused" or found.what == expected[:4], (number, found)


def test_manifest_holds_the_hash_of_every_other_member(packaged):
    contents = _contents(packaged.path)
    manifest = json.loads(contents.pop(MANIFEST))
    assert manifest["members"] == {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


@pytest.mark.parametrize("kind", ["changed", "cut", "removed", "added"])
@pytest.mark.parametrize("end", [".so", "weight_0", "weights_config.json", "byteorder"])
def test_members_that_are_not_those_written(packaged, tmp_path, kind, end):
    contents = _contents(packaged.path)
    name = next(name for name in contents if name.endswith(end))
    data = contents[name]
    if kind == "removed":
        del contents[name]
    elif kind == "added":
        name = f"{name}.new"
        contents[name] = data
    else:
        contents[name] = data[: len(data) // 2] if kind == "cut" else bytes([data[0] ^ 1]) + data[1:]
    with pytest.raises(CheckpointError, match=rf"other\.pt2 is damaged: {re.escape(name)} is"):
        lopro_fx.load_package(_write(tmp_path / "other.pt2", contents))


@pytest.mark.parametrize(
    ("entry", "value", "key"),
    [
        ("keys", lambda old: [[64 * heads, width] for heads, width in old], "cache_heads"),
        ("values", lambda old: [[heads, width // 2] for heads, width in old], "cache_heads"),
        ("keys", lambda old: old[:1], "cache_heads"),
        ("keys", lambda old: [], "cache_heads"),
        ("max_cache_len", lambda old: 4 * old, "max_cache_len"),
        ("max_cache_len", lambda old: 1 << 60, "max_cache_len"),
        ("batch_size", lambda old: 2, "batch_size"),
        ("bits", lambda old: 4 if old == 8 else 8, "cache_dtype|cache_heads"),
        ("vocabulary", lambda old: 10 * old, "vocabulary"),
    ],
)
def test_manifest_of_another_cache(packaged, tmp_path, entry, value, key):
    contents = _contents(packaged.path)
    manifest = json.loads(contents[MANIFEST])
    manifest["cache"][entry] = value(manifest["cache"][entry])
    with pytest.raises(CheckpointError, match=rf"other\.pt2: its manifest has ({key}) "):
        lopro_fx.load_package(_write(tmp_path / "other.pt2", contents, manifest))


GOOD = {
    "format": "lopro_fx package", "version": 1, "lopro_fx": "0.1.0", "torch": "2.13.0", "device": "cpu",
    "machine": "x86_64 linux", "instruction_sets": ["avx2"], "activations": "int8", "decode_bytes": 9, "members": {},
    "cache": {"batch_size": 1, "max_cache_len": 8, "keys": [[2, 16]], "values": [[2, 16]], "dtype": "float32",
              "vocabulary": 50, "bits": 0},
}  # fmt: skip


def test_manifest_of_right_types(tmp_path):
    assert read_manifest(_write(tmp_path / "model.pt2", {}, GOOD)) == GOOD


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("lopro_fx", [None, 1, []]),
        ("torch", [None, 2.13, {}]),
        ("device", [None, 0, ["cpu"]]),
        ("machine", [None, 5, {}]),
        ("instruction_sets", [None, "avx2", 3, [1], [["avx2"]], {"avx2": 1}]),
        ("activations", [None, 8]),
        ("decode_bytes", [None, "9", 9.5, -1, True]),
        ("members", [None, [], "x", {"byteorder": 1}, {"byteorder": None}]),
        ("cache", [None, [], "x", {}, {**GOOD["cache"], "unknown": 1}]),
        ("cache.batch_size", [None, "1", 0, -1, 1.0, True, 1 << 70]),
        ("cache.max_cache_len", [None, [8], 0, -8]),
        ("cache.vocabulary", [None, "50", 0]),
        ("cache.keys", [None, 2, {}, [2, 16], [[2]], [[2, 16, 1]], [["2", 16]], [[2, -16]], ["ab"], [None]]),
        ("cache.values", [None, "ab", [[2.0, 16]], [[0, 16]]]),
        ("cache.dtype", [None, 32, "nn", "float33", ["float32"], {}]),
        ("cache.bits", [None, 3, "8", True, 8.0, []]),
    ],
)
def test_manifest_of_wrong_types(tmp_path, entry, values):
    first, _, second = entry.partition(".")
    for value in values:
        manifest = {**GOOD, first: {**GOOD[first], second: value} if second else value}
        with pytest.raises(CheckpointError, match=rf"other\.pt2: its manifest is damaged: {entry}"):
            lopro_fx.load_package(_write(tmp_path / "other.pt2", {}, manifest))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[]", "not written by"),
        (b"null", "not written by"),
        (b'"lopro_fx package"', "not written by"),
        (b'{"format": ["lopro_fx package"]}', "not written by"),
        (b'{"format": "lopro_fx package", "version": [1]}', "version"),
        (b"[" * 1_000_000, "manifest is damaged"),
        (b'{"config": ' * 100_000, "manifest is damaged"),
        (b"9" * 10_000, "manifest is damaged|not written by"),
        (b"\xff\xfe{", "manifest is damaged"),
        (b"{", "manifest is damaged"),
        (b" " * (16 << 20) + b"{}", "16,777,218 bytes"),
    ],
)
def test_manifest_that_is_none(tmp_path, text, reason):
    with pytest.raises(CheckpointError, match=rf"other\.pt2.*({reason})"):
        lopro_fx.load_package(_write(tmp_path / "other.pt2", {MANIFEST: text}))


@pytest.mark.parametrize(
    "change",
    [
        lambda file, shape, stride, offset: [file, shape, stride, -1],
        lambda file, shape, stride, offset: [file, shape, stride, 1],
        lambda file, shape, stride, offset: [file, shape, stride, 1 << 70],
        lambda file, shape, stride, offset: [file, [2 * shape[0], *shape[1:]], stride, offset],
        lambda file, shape, stride, offset: [file, shape, [-1, *stride[1:]], offset],
        lambda file, shape, stride, offset: [file, shape, stride[1:], offset],
        lambda file, shape, stride, offset: [file, [True, *shape[1:]], stride, offset],
        lambda file, shape, stride, offset: [file, shape, stride],
        lambda file, shape, stride, offset: ["weight_999", shape, stride, offset],
        lambda file, shape, stride, offset: [None, shape, 5, offset],
        lambda file, shape, stride, offset: None,
    ],
)
def test_weights_beyond_their_file(packaged, tmp_path, change):
    contents = _contents(packaged.path)
    name = "data/aotinductor/decode/weights_config.json"
    config = json.loads(contents[name])
    first = next(iter(config))
    contents[name] = json.dumps({**config, first: change(*config[first])}).encode()
    with pytest.raises(CheckpointError, match=r"other\.pt2.*can't be loaded"):
        lopro_fx.load_package(_sealed(tmp_path / "other.pt2", contents))


def test_package_without_hashes(packaged, expected, tmp_path):
    """As written before manifests had them, and before metadata had the vocabulary."""
    contents = _contents(packaged.path)
    manifest = json.loads(contents[MANIFEST])
    del manifest["members"]
    for name in [name for name in contents if name.endswith("_metadata.json")]:
        metadata = json.loads(contents[name])
        assert metadata.pop("vocabulary") == str(VOCAB)
        contents[name] = json.dumps(metadata).encode()
    run = lopro_fx.load_package(_write(tmp_path / "older.pt2", contents, manifest))
    assert greedy(run, torch.tensor([PROMPT]), None, NEW)[0].tolist() == expected


def test_weights_are_freed_with_the_program(tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux' count of resident pages")

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    table = nn.Embedding(1 << 16, 256)
    size = table.weight.numel() * 4
    ids = torch.tensor([3, 4])
    program = torch.export.export(table, (ids,))
    compat.write_package(str(tmp_path / "m.pt2"), {"model": compile_program(program, tmp_path / "build", apart=True)})
    expected = table(ids)
    levels = []
    for _ in range(5):
        run = compat.load_package(str(tmp_path / "m.pt2"), -1)["model"]
        torch.testing.assert_close(run(ids), expected)
        loaded = resident()
        del run
        levels.append(resident())
        assert loaded - levels[-1] > 0.9 * size
    assert levels[-1] - levels[0] < 0.5 * size


def test_package_for_another_processor(packaged, monkeypatch):
    present = processor.instruction_sets()
    if not present:
        pytest.skip("this system lists no instruction sets")
    monkeypatch.setattr(processor, "instruction_sets", lambda: present[1:])
    with pytest.raises(CheckpointError, match=rf"processor.*\b{re.escape(present[0])}\b"):
        lopro_fx.load_package(packaged.path)
    monkeypatch.setattr(processor, "machine", lambda: "s390x linux")
    with pytest.raises(CheckpointError, match="s390x linux"):
        lopro_fx.load_package(packaged.path)


def test_prompt_longer_than_the_cache(packaged, binary):
    run = lopro_fx.load_package(packaged.path)
    with pytest.raises(ConfigError, match=rf"\b{CACHE + 1} tokens\b.*cache of {CACHE}\b"):
        run.prefill(torch.ones(1, CACHE + 1, dtype=torch.int64))
    done = subprocess.run([binary, packaged.path, "2"], input="5 " * CACHE, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"cache of {CACHE}" in done.stderr


def test_files_that_are_no_package(tmp_path, binary):
    with pytest.raises(CheckpointError, match=r"absent\.pt2"):
        lopro_fx.load_package(tmp_path / "absent.pt2")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        lopro_fx.load_package(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("other/version", "3")
    with pytest.raises(CheckpointError, match=r"other\.pt2"):
        lopro_fx.load_package(tmp_path / "other.pt2")
    done = subprocess.run([binary, tmp_path / "other.pt2", "2"], input="5", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


def _member(name: str, mode: int = 0o100600) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    ("member", "content", "reason"),
    [
        (_member("model/../../outside"), b"x", "outside"),
        (_member("/outside"), b"x", "outside"),
        (_member("model/..\\..\\outside"), b"x", "outside"),
        (_member("model/data/link", 0o120777), b"/etc", "outside"),
        (_member("model/data/weights/w"), bytes(100 << 20), "unpack to 104,857,"),
        (_member("model/extra/lopro_fx.json"), b"{}", "two members"),
    ],
)
def test_hostile_members_are_refused_before_anything_is_unpacked(tmp_path, member, content, reason):
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("model/extra/lopro_fx.json", json.dumps({"format": "lopro_fx package", "version": 1}))
        archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=reason):
        lopro_fx.load_package(path)
    assert names(tmp_path) == ["model.pt2"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_no_package(tmp_path):
    os.mkfifo(tmp_path / "model.pt2")
    with pytest.raises(CheckpointError, match="no file"):
        lopro_fx.load_package(tmp_path / "model.pt2")


def test_the_same_files_make_the_same_archive(packaged):
    with zipfile.ZipFile(packaged.path) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_full_disk_leaves_nothing(programs, tmp_path):
    with full_disk(100_000), pytest.raises((CheckpointError, lopro_fx.GraphError)):
        lopro_fx.package(programs, tmp_path / "model.pt2")
    assert names(tmp_path) == []
