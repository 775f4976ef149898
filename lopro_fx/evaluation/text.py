"""Text to calibrate and evaluate on, cut into windows of tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError

# Tokens before a cut that are dropped: the last ones of a part may differ from those of the whole text.
_TAIL_TOKENS = 256
_CHARS_PER_TOKEN = 6  # above what tokenisers reach on prose, so that one attempt is nearly always enough
_WORD_START = re.compile(r"(?<=\s)\S")


def builtin_text() -> tuple[str, str]:
    """(calibration text, evaluation text): the language reference that every Python carries as `pydoc` topics.

    Topics go by their sorted names, every third one to evaluation. Topics quote each other, so a paragraph that was
    seen is skipped: the two texts share none. They differ a little between Python versions.
    """
    from pydoc_data.topics import topics

    parts: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for index, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                parts[index % 3 == 2].append(paragraph.strip("\n"))
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file. Raises: ConfigError if it can't be read, is not UTF-8, or holds no text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"text {path} can't be read ({error.strerror}): give the path of a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"text {path} is not UTF-8 (byte {error.start}): convert it first") from error
    if not text.strip():
        raise ConfigError(f"text {path} is empty: give a file that holds text")
    return text


def token_windows(tokenizer: Any, text: str, seq_len: int, max_windows: int | None = None) -> Tensor:
    """Cut the tokens of `text` into windows: (windows, seq_len) int64, in order, without overlap or special tokens.

    There are at most `max_windows`, and only as much text is tokenised as they need. A rest shorter than a window is
    dropped. `tokenizer` is a Hugging Face tokenizer.

    Raises: ConfigError if a size is below 1 or the text is too short for one window.
    """
    for name, value in (("seq_len", seq_len), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: at least 1 is needed")
    ids = _encode(tokenizer, text) if max_windows is None else _first_tokens(tokenizer, text, seq_len * max_windows)
    count = len(ids) // seq_len
    if count == 0:
        raise ConfigError(
            f"the text has {len(ids)} tokens, a window needs {seq_len}: give more text or shorter windows"
        )
    return torch.tensor(ids[: count * seq_len], dtype=torch.int64, device="cpu").view(count, seq_len)


def _first_tokens(tokenizer: Any, text: str, count: int) -> list[int]:
    """Return the first `count` tokens of the whole text, or all if there are fewer."""
    length = (count + _TAIL_TOKENS) * _CHARS_PER_TOKEN
    while length < len(text):
        if (word := _WORD_START.search(text, length)) is None:
            break
        ids = _encode(tokenizer, text[: word.start()])
        if len(ids) >= count + _TAIL_TOKENS:
            return ids[:count]
        length *= 2
    return _encode(tokenizer, text)[:count]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
