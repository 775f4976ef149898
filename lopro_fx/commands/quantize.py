"""`lopro-fx quantize`: load, export, measure, quantise, measure again, save."""

from __future__ import annotations

import time
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx.budget import Budget, predicted
from lopro_fx.commands import data, output, target
from lopro_fx.commands.method import add_method, method_of
from lopro_fx.commands.source import DTYPES, Source, add_device, add_name, device_name, device_of, export
from lopro_fx.errors import ConfigError
from lopro_fx.evaluation import PerplexityResult
from lopro_fx.methods.base import Method
from lopro_fx.methods.rounding import Rounding
from lopro_fx.models import export_causal_lm, rebuild_model
from lopro_fx.models.load import SMOLLM2, load_model
from lopro_fx.models.positions import configured_limit
from lopro_fx.models.quiet import quiet
from lopro_fx.passes.linears import as_linears
from lopro_fx.plan import plannable, require_possible
from lopro_fx.progress import reporting
from lopro_fx.report.table import render
from lopro_fx.selection import select
from lopro_fx.state import state_of
from lopro_fx.store.files import same_place
from lopro_fx.tokens import require_known, require_length

_STORED = "auto"


def add(parser: ArgumentParser) -> None:
    add_name(parser, nargs="?", default=SMOLLM2)
    parser.add_argument(
        "--dtype",
        choices=(_STORED, *DTYPES),
        default=_STORED,
        help="of what is not quantised; auto works in float32 and keeps the stored type (default: auto)",
    )
    add_device(parser)
    add_method(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--budget",
        type=float,
        metavar="N",
        help="bits per weight in all; each layer gets the bits that lower the loss most",
    )
    size.add_argument("--max-bytes", type=int, metavar="N", help="the same in bytes of packed tensors")
    size.add_argument(
        "--max-kl", type=float, metavar="N", help="the fewest bytes with this predicted KL, in nats a token"
    )
    parser.add_argument("--calib", metavar="FILE", help=f"text to calibrate on (default: {data.BUILT_IN})")
    data.positive(parser, "--calib-samples", 32, "calibration windows")
    parser.add_argument("--eval", metavar="FILE", help=f"text to evaluate on (default: {data.BUILT_IN})")
    data.positive(parser, "--eval-windows", 24, "evaluation windows")
    data.positive(parser, "--seq-len", 512, "tokens in a window")
    parser.add_argument(
        "--out", metavar="DIR", help="folder to save to; finished layers are kept in DIR.partial until then"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def run(args: Namespace) -> None:
    started = time.monotonic()
    config, device, budget = method_of(args), device_of(args), _budget(args, method_of(args))
    output.check_json_path(args.json)
    if args.out and args.json:
        for folder in (Path(args.out), target.journal_of(Path(args.out))):
            if same_place(folder, Path(args.json)):
                raise ConfigError(f"--json {args.json}: that is the folder of --out or of its journal; name a file")
    out = None if args.out is None else target.Target(Path(args.out))
    texts = data.calibration_text(args.calib), data.evaluation_text(args.eval)
    computed = DTYPES.get(args.dtype, torch.float32)
    with reporting("load the model"):
        loaded = load_model(args.model, computed)
    samples = texts[0].windows(loaded.tokenizer, args.seq_len, args.calib_samples)
    windows = texts[1].windows(loaded.tokenizer, args.seq_len, args.eval_windows)
    data.warn_of_overlap(samples, windows)
    limit = configured_limit(loaded.model)
    if limit is not None and args.seq_len > limit:
        warnings.warn(f"--seq-len {args.seq_len}: the model was trained on positions up to {limit}", stacklevel=2)
    kept, bytes_before = loaded.stored if args.dtype == _STORED else computed, loaded.file_bytes
    source = export(loaded)
    del loaded
    # The other windows are checked where they are evaluated, before anything else.
    require_known(source.program, samples, "the text to calibrate on")
    require_length(source.program, args.seq_len, "--seq-len")
    selection = select(as_linears(source.program), config)
    if budget is not None and isinstance(config, Rounding):
        require_possible(selection, config, budget)
    if out is not None:
        out.require_space(source.program, selection, config, budget)
    before = data.measure("perplexity before", source.program, source.tokenizer, windows, device)
    quantized, seconds = _quantize(source, samples, config, budget, out, device)
    tokenizer, name, origin, settings = source.tokenizer, source.name, source.origin, source.settings
    # Without this, the original weights would stay in memory during the second evaluation.
    del source
    after = data.measure("perplexity after", quantized, tokenizer, windows, device)
    if kept != computed:
        quantized = _stored_as(kept, quantized, settings[0])
    figures = _figures(quantized, before, after, seconds)
    result = {
        "model": name,
        "source": origin,
        "dtype": str(kept).removeprefix("torch."),
        "device": device_name(device),
        **figures,
        "budget": None
        if budget is None
        else {name: value for name, value in vars(budget).items() if value is not None},
        "calibration": {"text": texts[0].name, "windows": len(samples), "seq_len": args.seq_len},
        "evaluation": {
            "text": texts[1].name,
            "windows": len(windows),
            "seq_len": args.seq_len,
            "tokens": after.tokens,
            "dtype": str(computed).removeprefix("torch."),
        },
        "lopro_fx": lopro_fx.__version__,
        "torch": torch.__version__,
        "bytes_before": bytes_before,
        "bytes_after": None,
    }
    try:
        if out is not None:
            with reporting("save"):
                out.save(quantized, (tokenizer, *settings), lambda: {**result, **target.costs(started)})
            result["bytes_after"] = sum(file.stat().st_size for file in out.folder.iterdir())
    finally:
        result.update(target.costs(started))
        output.deliver(args.json, result, _table(result, args.out))


def _budget(args: Namespace, config: Method) -> Budget | None:
    """Read the budget, and refuse a method that has no options."""
    given = {"bits_per_weight": args.budget, "max_bytes": args.max_bytes, "max_kl": args.max_kl}
    if all(value is None for value in given.values()):
        return None
    budget = Budget(**given)
    plannable(config, budget, args.calib or ())
    return budget


def _quantize(
    source: Source,
    samples: torch.Tensor,
    config: Method,
    budget: Budget | None,
    out: target.Target | None,
    device: torch.device,
) -> tuple[ExportedProgram, float]:
    started = time.monotonic()
    with reporting("quantise") as progress:
        quantized = lopro_fx.quantize(
            source.program,
            list(samples.split(1)),
            config,
            budget=budget,
            resume=None if out is None else out.journal,
            progress=progress,
            device=device,
        )
    return quantized, time.monotonic() - started


def _stored_as(dtype: torch.dtype, quantized: ExportedProgram, config: Any) -> ExportedProgram:
    """Put the packed tensors into the program of a model of `dtype`, and set the configuration's dtype."""
    with reporting("export"), quiet():
        program = export_causal_lm(rebuild_model(quantized, config, dtype))
    config.dtype = dtype
    return lopro_fx.apply(program, state_of(quantized))


def _figures(
    quantized: ExportedProgram, before: PerplexityResult, after: PerplexityResult, seconds: float
) -> dict[str, Any]:
    report = lopro_fx.report(quantized)
    return {
        "method": report.config["method"],
        "config": report.config,
        "ppl_before": before.ppl,
        "ppl_after": after.ppl,
        "bits_per_byte_before": before.bits_per_byte,
        "bits_per_byte_after": after.bits_per_byte,
        "bits_per_weight": report.bits_per_weight,
        "plan": report.info.get("plan"),
        "weights": report.weights,
        "packed_bytes": report.packed_bytes,
        "kept_bytes": report.kept_bytes,
        "quantize_seconds": seconds,
    }


def _table(result: dict[str, Any], out: str | None) -> str:
    calibration, evaluation = result["calibration"], result["evaluation"]
    before, after = result["bytes_before"], result["bytes_after"]
    if after is not None:
        saved, size = out, f"{after:,} bytes"
    else:
        tensors = result["packed_bytes"] + result["kept_bytes"]
        saved = "nothing (give --out DIR to keep it)" if out is None else f"nothing ({out} could not be written)"
        size = f"about {tensors:,} bytes, and the tokenizer"
    rows = [
        ("model", result["model"]),
        ("from", result["source"]),
        ("calibrated on", f"{calibration['text']}, {calibration['windows']} x {calibration['seq_len']} tokens"),
        (
            "evaluated on",
            f"{evaluation['text']}, {evaluation['windows']} x {evaluation['seq_len']} tokens, in {evaluation['dtype']}",
        ),
        ("device", result["device"]),
        ("perplexity before", f"{result['ppl_before']:.3f}"),
        ("perplexity after", f"{result['ppl_after']:.3f}"),
        ("bits per weight", f"{result['bits_per_weight']:.3f} (scales, zeros, permutations and factors counted)"),
        *([("plan", predicted(result["plan"]))] if result["plan"] else []),
        ("packed bytes", f"{result['packed_bytes']:,} for {result['weights']:,} weights"),
        ("kept bytes", f"{result['kept_bytes']:,} not quantised, in {result['dtype']}"),
        ("seconds", f"{result['seconds']:.0f}, of which {result['quantize_seconds']:.0f} to quantise"),
        ("peak memory", f"{result['peak_rss_bytes']:,} bytes"),
        ("saved to", saved),
        ("files before", "not known" if before is None else f"{before:,} bytes"),
        ("files after", size),
    ]
    bits = f", {result['config']['bits']} bits" if "bits" in result["config"] and not result["budget"] else ""
    return render(result["method"] + bits, ("", ""), rows, width=120)
