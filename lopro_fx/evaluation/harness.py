"""Run tasks of EleutherAI's lm-evaluation-harness on any program. Importing this needs the package `lm-eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from torch import Tensor

from lopro_fx.errors import ConfigError, LoProError, first_line
from lopro_fx.evaluation.likelihood import continuation
from lopro_fx.models.quiet import quiet
from lopro_fx.progress import Progress, silent
from lopro_fx.tokens import require_known

_MAX_LENGTH = 2048  # tokens in a pass where the tokenizer doesn't say
_MAX_NEW_TOKENS = 256  # lm-eval's own default


def run_tasks(
    program: Callable[[Tensor], Tensor],
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    progress: Progress = silent,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Run tasks and return figures by task, under lm-eval's names ("acc,none", "acc_stderr,none", ...).

    Args:
        program: (1, S) token ids -> (1, S, vocabulary) logits.
        tokenizer: the model's Hugging Face tokenizer.
        tasks: names of tasks, groups or tags.
        include_path: folder with task definitions (YAML) beside those of the package.
        limit: number of items of each task, the first ones; None for all.
        progress: called after each request with (requests done, requests of this kind, "").
        device: where the program runs.

    Raises: ConfigError if a task is unknown or can't be run, e.g. since its data can't be fetched.
    """
    try:
        with quiet():
            manager = _manager(include_path)
            if unknown := [task for task in tasks if not manager.match_tasks([task])]:
                raise ConfigError(f"lm-eval has no task {', '.join(unknown)}: `lm-eval ls tasks` lists them")
            results = simple_evaluate(
                ProgramLM(program, tokenizer, progress, device), tasks=list(tasks), limit=limit, task_manager=manager,
                log_samples=False,
            )  # fmt: skip
    except LoProError:
        raise
    except Exception as error:  # a task's data and code come from elsewhere
        raise ConfigError(
            f"lm-eval can't run {', '.join(tasks)}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return {
        name: {key: value for key, value in figures.items() if isinstance(value, (int, float))}
        for name, figures in results["results"].items()
    }


@cache
def _manager(include_path: str | None) -> TaskManager:
    """Read all task definitions; the package has thousands, which takes seconds."""
    return TaskManager(include_path=include_path)


class ProgramLM(TemplateLM):
    """Program and tokenizer as a model of lm-eval. Requests run one by one; texts are cut from the left to the
    tokenizer's limit (`max_length`); generation is greedy."""

    def __init__(
        self,
        program: Callable[[Tensor], Tensor],
        tokenizer: Any,
        progress: Progress = silent,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        # lm-eval has a `device` of its own, which its other models set.
        self.program, self.tokenizer, self.progress, self.place = program, tokenizer, progress, device
        longest = getattr(tokenizer, "model_max_length", None)
        self.max_length = longest if isinstance(longest, int) and longest < 1 << 30 else _MAX_LENGTH

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        start = self.tokenizer.bos_token_id
        if start is None and (start := self.eot_token_id) is None:
            raise ConfigError("a text without context needs a token before it: the tokenizer has no BOS or EOS token")
        return start

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text; by default with the tokenizer's special tokens but no second BOS, as lm-eval does."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        results = []
        for done, (texts, context, wanted) in enumerate(requests, 1):
            tokens = [*context, *wanted][-self.max_length - 1 :]
            given = len(tokens) - len(wanted)
            if not wanted or given < 1:
                raise ConfigError(
                    f"a continuation of {len(wanted)} tokens can't be scored: 1 to {self.max_length} are possible"
                )
            results.append(continuation(self.program, tokens, given, self.place))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
            self.progress(done, len(requests), "")
        return results

    def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
        totals = []
        for done, request in enumerate(requests, 1):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = (make_disjoint_window(window) for window in windows)
            totals.append(
                sum(continuation(self.program, [*given, *rest], len(given), self.place)[0] for given, rest in pairs)
            )
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
            self.progress(done, len(requests), "")
        return totals

    def generate_until(self, requests: Any, **_: Any) -> list[str]:
        texts = []
        for done, request in enumerate(requests, 1):
            prompt, settings = request.args
            if settings.get("do_sample", settings.get("temperature", 0) > 0):
                raise ConfigError("the task asks for sampled text: only greedy generation is supported")
            until = settings.get("until") or []
            texts.append(
                self._greedy(
                    prompt,
                    [until] if isinstance(until, str) else until,
                    settings.get("max_gen_toks") or settings.get("max_new_tokens") or _MAX_NEW_TOKENS,
                )
            )
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
            self.progress(done, len(requests), "")
        return texts

    @torch.no_grad()
    def _greedy(self, prompt: str, until: Sequence[str], new_tokens: int) -> str:
        """Generate the text that follows the prompt, up to the first of `until`."""
        ids = self.tok_encode(prompt)[-max(1, self.max_length - new_tokens) :] or [self.prefix_token_id]
        require_known(self.program, ids, "the prompt")
        start, text = len(ids), ""
        while len(ids) - start < new_tokens:
            token = int(self.program(torch.tensor([ids], dtype=torch.int64, device=self.place))[0, -1].argmax())
            if token == self.eot_token_id:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids[start:], skip_special_tokens=True)
            if any(end in text for end in until):
                break
        return text[: min((text.find(end) for end in until if end in text), default=len(text))]
