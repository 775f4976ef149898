"""lm-eval on a program gives what it gives on the model itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from lopro_fx.errors import ConfigError
from lopro_fx.evaluation import builtin_text, read_task, zero_shot
from lopro_fx.models import export_causal_lm

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lopro_fx[eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lopro_fx.evaluation.harness import ProgramLM, run_tasks

_FIELDS = {
    "multiple_choice": {
        "doc_to_text": "{{ctx}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{ctx}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "generate_until": {
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{endings[0]}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a task of each kind over one local file, so that nothing is fetched."""
    folder = tmp_path_factory.mktemp("tasks")
    words = builtin_text()[1].split()
    rows = [
        {
            "id": index,
            "ctx": " ".join(words[40 * index : 40 * index + 20]),
            "endings": [words[40 * index + 20], f"{words[40 * index + 30]} x"],
            "label": index % 2,
        }
        for index in range(12)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind, fields in _FIELDS.items():
        task = {
            "task": f"local_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
            "test_split": "test",
            "output_type": kind,
            **fields,
            "metadata": {"version": 1},
        }
        (folder / f"{kind}.yaml").write_text(json.dumps(task))  # JSON is YAML
    broken = (folder / "multiple_choice.yaml").read_text().replace("items.jsonl", "absent.jsonl")
    (folder / "broken.yaml").write_text(broken.replace("local_", "broken_"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer):
    """With an EOS token, which lm-eval's own model needs."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.bos_token
    return tokenizer


def _reference(llama, tokenizer, max_length):
    return HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=1, max_length=max_length)


@pytest.fixture(scope="module")
def reference(llama, tokenizer):
    return _reference(llama, tokenizer, 64)


@pytest.fixture(scope="module")
def program(llama):
    return export_causal_lm(llama).module()


@pytest.fixture
def adapter(program, tokenizer):
    adapter = ProgramLM(program, tokenizer)
    adapter.max_length = 64
    return adapter


@pytest.mark.parametrize("kind", _FIELDS)
def test_figures_of_a_task(llama, program, tokenizer, folder, kind):
    seen = []
    figures = run_tasks(program, tokenizer, [f"local_{kind}"], include_path=str(folder), limit=7,
                        progress=lambda *state: seen.append(state))  # fmt: skip
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    reference = _reference(llama, tokenizer, 2048)
    expected = simple_evaluate(reference, tasks=[f"local_{kind}"], task_manager=manager, limit=7, log_samples=False)
    (measured,), (wanted,) = figures.values(), expected["results"].values()
    assert any("," in name for name in measured)
    for name, value in measured.items():
        assert value == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    assert seen[-1][0] == seen[-1][1] == (14 if kind == "multiple_choice" else 7)


def test_accuracy_is_that_of_our_own_scoring(program, tokenizer, folder):
    figures = run_tasks(program, tokenizer, ["local_multiple_choice"], include_path=str(folder))[
        "local_multiple_choice"
    ]
    own = zero_shot(program, tokenizer, read_task(folder / "items.jsonl"), branched=False)
    assert (figures["acc,none"], figures["acc_norm,none"]) == (own.acc, own.acc_norm)


def _requests(kind, *arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_texts_longer_than_the_model_takes(adapter, reference):
    text = builtin_text()[1][:1500]
    assert len(adapter.tok_encode(text)) > 2 * adapter.max_length
    requests = _requests("loglikelihood", (text, " and so on"), ("", "for"), ("a ", " b"))
    for ours, theirs in zip(adapter.loglikelihood(requests), reference.loglikelihood(requests), strict=True):
        assert ours == (pytest.approx(theirs[0], rel=1e-5), theirs[1])
    requests = _requests("loglikelihood_rolling", (text,), ("x",))
    assert adapter.loglikelihood_rolling(requests) == pytest.approx(reference.loglikelihood_rolling(requests), rel=1e-5)


def test_the_likeliest_continuation_is_known_as_such(adapter, tokenizer, program):
    context = tokenizer("the function")["input_ids"]
    with torch.no_grad():
        best, worst = (int(pick(program(torch.tensor([context]))[0, -1])) for pick in (torch.argmax, torch.argmin))
    results = adapter._loglikelihood_tokens([(None, context, [best]), (None, context, [worst])])
    assert [greedy for _, greedy in results] == [True, False]


def test_generation(adapter, reference):
    settings = {"until": ["\n\n", "q"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0}
    requests = _requests("generate_until", *((text, settings) for text in ("The class", "import os", "x" * 400)))
    assert adapter.generate_until(requests) == reference.generate_until(requests)


def test_errors(adapter, program, tokenizer, folder):
    adapter.tokenizer = copy.deepcopy(tokenizer)
    adapter.tokenizer.bos_token = adapter.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="BOS or EOS"):
        adapter.loglikelihood(_requests("loglikelihood", ("", "x")))
    with pytest.raises(ConfigError, match="local_nothing"):
        run_tasks(program, tokenizer, ["local_multiple_choice", "local_nothing"], include_path=str(folder))
    with pytest.raises(ConfigError, match="broken_multiple_choice"):
        run_tasks(program, tokenizer, ["broken_multiple_choice"], include_path=str(folder))
    with pytest.raises(ConfigError, match="sampled"):
        adapter.generate_until(_requests("generate_until", ("a", {"do_sample": True})))
    with pytest.raises(ConfigError, match="65 tokens"):
        adapter._loglikelihood_tokens([(None, [1], [5] * 65)])
