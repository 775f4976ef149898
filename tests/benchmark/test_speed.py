from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lopro_fx.benchmark import Speed, measure_speed, peak_rss, read_bandwidth
from lopro_fx.benchmark.bandwidth import last_level_cache
from lopro_fx.errors import ConfigError
from lopro_fx.generation.export import export_for_generation
from lopro_fx.generation.generator import Generator

_CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_CONFIG)).eval()
    return Generator.from_programs(export_for_generation(model, max_cache_len=16, batch_size=2))


class Recorder:
    """Passes calls on and notes what they were."""

    def __init__(self, generator):
        self.generator, self.calls, self.batch_size = generator, [], generator.batch_size

    def reset(self):
        self.calls.append("reset")
        self.generator.reset()

    def prefill(self, input_ids, padding=None):
        self.calls.append(("prefill", input_ids))
        return self.generator.prefill(input_ids, padding)

    def decode(self, tokens):
        self.calls.append(("decode", tokens))
        return self.generator.decode(tokens)


def test_each_run_is_a_greedy_generation_of_its_own(generator):
    recorder, seen = Recorder(generator), []
    speed = measure_speed(recorder, vocabulary=64, prompt_tokens=5, new_tokens=3, repeats=2,
                          progress=lambda *state: seen.append(state))  # fmt: skip
    runs = [recorder.calls[start : start + 5] for start in range(0, 15, 5)]
    assert len(recorder.calls) == 15, "one run to warm up and two that count"
    for run in runs:
        kinds = [call if isinstance(call, str) else call[0] for call in run]
        assert kinds == ["reset", "prefill", "decode", "decode", "decode"]
        for (_, mine), (_, first) in zip(run[1:], runs[0][1:], strict=True):
            assert torch.equal(mine, first)
    prompt = runs[0][1][1]
    assert prompt.shape == (2, 5)
    assert 0 <= prompt.min() <= prompt.max() < 64
    generator.reset()
    assert torch.equal(runs[0][2][1], generator.prefill(prompt).argmax(-1, keepdim=True))
    assert [len(each) for each in (speed.prefill_seconds, speed.first_token_seconds, speed.decode_seconds)] == [2] * 3
    assert all(
        first >= alone > 0 for first, alone in zip(speed.first_token_seconds, speed.prefill_seconds, strict=True)
    )
    assert [state[:2] for state in seen] == [(1, 3), (2, 3), (3, 3)]


def test_figures_are_medians_over_all_rows():
    speed = Speed(2, 10, 6, prefill_seconds=(1.0, 2.0, 9.0), first_token_seconds=(3.0, 2.0, 11.0),
                  decode_seconds=(4.0, 3.0, 99.0))  # fmt: skip
    assert (speed.prefill_tokens_per_second, speed.first_token, speed.decode_tokens_per_second) == (10.0, 3.0, 3.0)


def test_errors(generator):
    for name in ("prompt_tokens", "new_tokens", "repeats"):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            measure_speed(generator, vocabulary=64, **{name: 0})
    with pytest.raises(ConfigError, match=r"cache of 16\b"):
        measure_speed(generator, vocabulary=64, prompt_tokens=10, new_tokens=7, repeats=1)


def test_bandwidth_is_that_of_a_machine():
    assert 1 << 16 <= last_level_cache() <= 4 << 30
    assert 1e8 < read_bandwidth(1 << 24, repeats=3) < 1e13


def test_peak_memory_is_this_process_alone():
    """300 MB of the parent are not the child's; 300 MB that the child gave back are."""
    mine = torch.ones(300 << 18)
    command = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('memory', sys.argv[1])\n"
        "memory = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(memory)\n"
        "before = memory.peak_rss()\nblock = b'x' * (300 << 20)\ndel block\nprint(before, memory.peak_rss())\n"
    )
    path = sys.modules["lopro_fx.benchmark.memory"].__file__
    out = subprocess.run([sys.executable, "-c", command, path], capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert peak_rss() > mine.nbytes
    assert 1 << 20 < before < 100 << 20
    assert 290 << 20 < after - before < 330 << 20
