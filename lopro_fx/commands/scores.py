"""Tables of `lopro-fx eval`."""

from __future__ import annotations

from typing import Any

from lopro_fx.report.table import render


def tables(result: dict[str, Any]) -> str:
    """Draw figures of the model and, where there is one, of the original beside it, then their divergence."""
    original = result.get("original")
    scores = [result] if original is None else [result, original]
    which = ("model", "original")[: len(scores)]
    rows: list[tuple[str, ...]] = [
        ("model", result["model"], result.get("against", "")),
        ("text", f"{result['text']}, {result['windows']} x {result['seq_len']} tokens", "the same"),
        ("perplexity", *(f"{score['ppl']:.3f}" for score in scores)),
        ("bits per byte", *(f"{score['bits_per_byte']:.4f}" for score in scores)),
        ("seconds", *(f"{score['seconds']:.1f}" for score in scores)),
    ]
    for name, task in result.get("tasks", {}).items():
        rows.append((f"{name}: acc, {task['model']['items']} items", *(_accuracy(task[each]) for each in which)))
        rows.append((f"{name}: acc_norm", *(_percent(task[each]["acc_norm"]) for each in which)))
    if "lm_eval" in result:
        for name, figures in result["lm_eval"]["model"].items():
            rows += [
                (f"lm-eval {name}: {metric}", *(f"{result['lm_eval'][each][name][metric]:.4f}" for each in which))
                for metric in figures
                if "," in metric  # "acc,none": a measure and its filter; the rest counts items
            ]
    titles = ("", "", "original")[: len(scores) + 1]
    shown = render("evaluation", titles, [row[: len(titles)] for row in rows], width=120)
    return shown if original is None else f"{shown}\n{_difference(result['divergence'])}"


def _difference(figures: dict[str, float]) -> str:
    rows = [
        ("KL divergence", f"{figures['kl_mean']:.5f} ± {figures['kl_stderr']:.5f} nats a token"),
        ("  median", f"{figures['kl_median']:.5f}"),
        ("  99 % of tokens below", f"{figures['kl_p99']:.5f}"),
        ("  maximum", f"{figures['kl_max']:.5f}"),
        ("same likeliest token", f"{_percent(figures['top1'])} ± {_percent(figures['top1_stderr'])}"),
        ("ln of perplexity ratio", f"{figures['ln_ppl_ratio']:+.5f} ± {figures['ln_ppl_ratio_stderr']:.5f}"),
        ("perplexity ratio", f"{figures['ppl_ratio']:.5f}"),
    ]
    return render("difference from the original", ("", ""), rows, width=120)


def _accuracy(score: dict[str, float]) -> str:
    return f"{_percent(score['acc'])} ± {_percent(score['acc_stderr'])}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
