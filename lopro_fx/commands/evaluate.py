"""`lopro-fx eval`: perplexity, bits per byte, divergence from the original, multiple-choice and lm-eval tasks."""

from __future__ import annotations

import json
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopro_fx.commands import data, output, scores
from lopro_fx.commands.source import Source, add_device, add_model, device_of, is_checkpoint, open_either
from lopro_fx.errors import ConfigError, LoProError, ModelError, first_line
from lopro_fx.evaluation import DivergenceResult, Item, divergence, predicted_bytes, read_task, zero_shot
from lopro_fx.models.load import SMOLLM2
from lopro_fx.passes.to_device import to_device
from lopro_fx.progress import reporting
from lopro_fx.store.checkpoint import load
from lopro_fx.tokens import require_length

_REPORT = "report.json"
_Models = dict[str, Callable[[Tensor], Tensor]]


def add(parser: ArgumentParser) -> None:
    add_model(parser)
    add_device(parser)
    parser.add_argument("--text", metavar="FILE", help=f"text to evaluate on (default: {data.BUILT_IN})")
    data.positive(parser, "--windows", 24, "evaluation windows")
    data.positive(parser, "--seq-len", 512, "tokens in a window")
    against = parser.add_mutually_exclusive_group()
    against.add_argument(
        "--against",
        metavar="ORIGINAL",
        help="model to compare with (default for DIR: the one that it was made from, if that is on this machine)",
    )
    against.add_argument("--alone", action="store_true", help="compare with nothing")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="[NAME=]FILE", help="multiple-choice tasks, one item a line of JSON"
    )
    parser.add_argument("--lm-eval", metavar="TASK,TASK", help="tasks of EleutherAI's lm-eval (extra: lopro_fx[eval])")
    parser.add_argument("--lm-eval-path", metavar="DIR", help="folder with more task definitions for --lm-eval")
    parser.add_argument("--limit", type=data.whole, metavar="N", help="only the first N items of each task")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def run(args: Namespace) -> None:
    output.check_json_path(args.json)
    device = device_of(args)
    tasks = _tasks(args.tasks, args.limit)
    names = [name for name in (args.lm_eval or "").split(",") if name]
    harness = _harness(names) if names else None
    text = data.evaluation_text(args.text)
    original = None if args.alone else _original(args.model, args.against, args.dtype)
    source = _open(args.model, args.dtype, original)
    tokenizer = source.tokenizer
    windows = text.windows(tokenizer, args.seq_len, args.windows)
    result = {"model": source.name, "text": text.name, "windows": len(windows), "seq_len": args.seq_len}
    require_length(source.program, args.seq_len, "--seq-len")
    models: _Models = {"model": to_device(source.program, device).module()}
    if original is None:
        result |= asdict(data.measure("perplexity", source.program, tokenizer, windows, device))
    else:
        if not torch.equal(windows, text.windows(original.tokenizer, args.seq_len, args.windows)):
            raise ConfigError(f"{args.model} and {original.name} split text into other tokens: they can't be compared")
        models["original"] = to_device(original.program, device).module()
        difference = asdict(_compare(models, tokenizer, windows, device))
        result |= {
            **difference.pop("program"),
            "against": original.name,
            "original": difference.pop("original"),
            "divergence": difference,
        }
    if tasks:
        result["tasks"] = {name: _score(name, task, models, tokenizer, device) for name, task in tasks.items()}
    if harness is not None:
        result["lm_eval"] = {}
        for which, program in models.items():
            with reporting(f"lm-eval, {which}") as progress:
                result["lm_eval"][which] = harness(
                    program, tokenizer, names, include_path=args.lm_eval_path, limit=args.limit, progress=progress,
                    device=device,
                )  # fmt: skip
    output.deliver(args.json, result, scores.tables(result))


def _tasks(given: list[str], limit: int | None) -> dict[str, tuple[str, list[Item]]]:
    """Read (file, items) by name, before the long work starts."""
    tasks = {}
    for entry in given:
        name, equals, file = entry.partition("=")
        if not equals:
            name, file = Path(entry).stem, entry
        if name in tasks:
            raise ConfigError(f"--tasks {entry}: {name} is there twice; name one of them with NAME=FILE")
        tasks[name] = (file, read_task(file, limit))
    return tasks


def _harness(names: list[str]) -> Callable[..., dict[str, Any]]:
    """Import the function that runs tasks of lm-eval.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from lopro_fx.evaluation.harness import run_tasks
    except ImportError as error:
        raise ConfigError(
            f"--lm-eval {','.join(names)} needs lm-eval ({error}): pip install 'lopro_fx[eval]'"
        ) from error
    return run_tasks


def _original(model: str, against: str | None, dtype: str) -> Source | None:
    """Open the model to compare with: `against`, or else the one that the folder was made from, if it says so."""
    if against is not None:
        return open_either(against, dtype)
    report = Path(model) / _REPORT
    if not (is_checkpoint(model) and report.is_file()):
        return None
    try:
        made = json.loads(report.read_text(encoding="utf-8"))
        # A folder may have been named relative to where quantize ran; its origin holds the whole path.
        before, prefix, path = made["source"].partition("folder ")
        name = path if prefix and not before else made["model"]
        # The folder may be a stranger's: the hub is not asked for a name that it gives.
        if name != SMOLLM2 and not Path(name).expanduser().exists():
            raise ModelError(f"{name} is not on this machine")
        return open_either(name, dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, LoProError) as error:
        advice = "--against names the original, --alone leaves it out"
        warnings.warn(f"{model} is not compared with its original: {first_line(error)} ({advice})", stacklevel=2)
        return None


def _open(model: str, dtype: str, original: Source | None) -> Source:
    """Open the model to evaluate; a folder of `lopro_fx.save`, which holds no tokenizer, takes the original's."""
    if original is None or not is_checkpoint(model) or any(Path(model).glob("tokenizer*")):
        return open_either(model, dtype)
    return Source(load(model), original.tokenizer, model, f"folder {Path(model).resolve()}")


def _compare(models: _Models, tokenizer: Any, windows: Tensor, device: torch.device) -> DivergenceResult:
    with reporting("divergence") as progress:
        return divergence(
            models["model"],
            models["original"],
            windows,
            n_bytes=predicted_bytes(tokenizer, windows),
            progress=progress,
            device=device,
        )


def _score(
    name: str, task: tuple[str, list[Item]], models: _Models, tokenizer: Any, device: torch.device
) -> dict[str, Any]:
    """Score a task: its file, and figures by model."""
    file, items = task
    figures: dict[str, Any] = {"file": file}
    for which, program in models.items():
        with reporting(f"{name}, {which}") as progress:
            figures[which] = asdict(
                zero_shot(program, tokenizer, items, branched=False, progress=progress, device=device)
            )
    return figures
