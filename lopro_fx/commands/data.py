"""Windows of tokens to calibrate and evaluate on, from a file or from the text that comes with Python."""

from __future__ import annotations

import math
import warnings
from argparse import ArgumentParser, ArgumentTypeError
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx.errors import ConfigError
from lopro_fx.evaluation import PerplexityResult, builtin_text, perplexity, predicted_bytes, read_text, token_windows
from lopro_fx.passes.to_device import to_device
from lopro_fx.progress import reporting

_PASSAGE = 64  # tokens: manuals of one language repeat shorter ones
BUILT_IN = "built-in text (Python's pydoc topics)"


@dataclass(frozen=True)
class Text:
    """Text and its name."""

    name: str
    content: str

    def windows(self, tokenizer: Any, seq_len: int, count: int) -> Tensor:
        """Cut the text into (at most `count`, seq_len) int64; warn if it fills fewer.

        Raises:
            ConfigError: the text is too short for one.
        """
        try:
            windows = token_windows(tokenizer, self.content, seq_len, count)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from error
        if len(windows) < count:
            warnings.warn(
                f"{self.name} fills {len(windows)} windows of {seq_len} tokens, {count} were asked for; what is left "
                "after the last one is not used",
                stacklevel=2,
            )
        return windows


def warn_of_overlap(calibration: Tensor, evaluation: Tensor) -> None:
    """Warn if evaluation windows (W, S) hold text of the calibration windows (V, S)."""
    length = min(_PASSAGE, calibration.shape[1], evaluation.shape[1])

    def passages(windows: Tensor) -> list[set[bytes]]:
        return [{part.numpy().tobytes() for part in window.unfold(0, length, 1)} for window in windows]

    seen = set().union(*passages(calibration))
    shared = sum(not seen.isdisjoint(window) for window in passages(evaluation))
    if shared:
        warnings.warn(
            f"{shared} of {len(evaluation)} evaluation windows share passages of {length} tokens with the calibration "
            "text: the perplexity after is better than on other text; give --eval another text",
            stacklevel=2,
        )


def calibration_text(path: str | None) -> Text:
    """Read the file, or the built-in calibration text.

    Raises:
        ConfigError: the file can't be read.
    """
    return Text(BUILT_IN, builtin_text()[0]) if path is None else Text(path, read_text(path))


def evaluation_text(path: str | None) -> Text:
    """Read the file, or the built-in evaluation text, which shares no paragraph with the one for calibration.

    Raises:
        ConfigError: the file can't be read.
    """
    return Text(BUILT_IN, builtin_text()[1]) if path is None else Text(path, read_text(path))


def positive(parser: ArgumentParser, name: str, default: int, meaning: str) -> None:
    """Add an option that takes a whole number of at least 1."""
    parser.add_argument(name, type=whole, default=default, metavar="N", help=f"{meaning} (default: {default})")


def whole(value: str) -> int:
    """Parse a whole number of at least 1."""
    if not value.isdecimal() or int(value) < 1:
        raise ArgumentTypeError(f"{value}: must be a whole number, at least 1")
    return int(value)


def above_zero(value: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{value}: must be a finite number above 0")
    return number


def measure(
    title: str, program: ExportedProgram, tokenizer: Any, windows: Tensor, device: torch.device
) -> PerplexityResult:
    """Measure perplexity and bits per byte on `device`, with a progress bar."""
    module = to_device(program, device).module()
    with reporting(title) as progress:
        return perplexity(
            module, windows, n_bytes=predicted_bytes(tokenizer, windows), progress=progress, device=device
        )
