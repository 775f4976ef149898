"""Run a prefill and a decode program on one KV cache."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from lopro_fx.devices import home_of
from lopro_fx.errors import ConfigError
from lopro_fx.generation.programs import CacheSpec, GenerationPrograms
from lopro_fx.passes.lookups import size_ranges, table_rows, user_placeholders


class TokenModel(Protocol):
    """Interface that `generate` needs: logits (B, vocabulary) of the last token, after a prompt or one more token.

    `rows` is the number of token ids that the embedding holds, None if unknown.
    """

    rows: int | None

    @property
    def batch_size(self) -> int:
        """Rows that are generated together."""
        ...

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def prefill(self, input_ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """Take `input_ids` (B, S) int64, of which the first `padding` (B,) of each row are no text."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Take one more token a row, (B, 1) int64."""
        ...


class Generator:
    """Prefill and decode programs with the cache between them.

    Threads may share it: `generate` holds its `lock` for a whole text, so texts come one after another. Calls of
    `prefill` and `decode` of your own that belong together need `with generator.lock:` around them.

    Args:
        prefill, decode: programs as in `GenerationPrograms`, or anything callable with their inputs.
        cache: sizes of the cache, which is allocated here.
        tokenizer: called once, on first use of the tokenizer, since transformers takes time and memory.
        device: where the programs' tensors are.
        info: the package's manifest.
    """

    def __init__(
        self,
        prefill: Callable[..., Tensor],
        decode: Callable[..., Tensor],
        cache: CacheSpec,
        *,
        tokenizer: Callable[[], Any] = lambda: None,
        device: torch.device | str = "cpu",
        info: dict[str, Any] | None = None,
    ) -> None:
        self.cache, self.info, self._open_tokenizer = cache, info or {}, tokenizer
        self.rows: int | None = cache.vocabulary
        self._prefill, self._decode, self._device = prefill, decode, torch.device(device)
        self._keys, self._values = cache.allocate(device)
        self.lock = threading.RLock()
        self._slots = torch.arange(cache.max_cache_len, device=device, dtype=torch.int64)
        self.reset()

    @classmethod
    def from_programs(cls, programs: GenerationPrograms) -> Generator:
        """Run the programs in eager mode, on the device of their weights."""
        device = next((tensor.device for tensor in programs.decode.state_dict.values()), torch.device("cpu"))
        prefill, decode = _module(programs.prefill), _module(programs.decode)
        generator = cls(prefill, decode, programs.cache, device=device)
        generator.rows = table_rows(programs.prefill)
        return generator

    @property
    def batch_size(self) -> int:
        """Rows that are generated together."""
        return self.cache.batch_size

    @property
    def max_cache_len(self) -> int:
        """Most tokens of a row, padding included."""
        return self.cache.max_cache_len

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of Hugging Face, or None if there is none or transformers is missing."""
        return self._open_tokenizer()

    @property
    def tokens(self) -> int:
        """Tokens of a row that the cache holds, padding included."""
        return self._tokens

    def reset(self) -> None:
        """Forget all tokens."""
        self._tokens = 0
        self._padding = torch.zeros(self.cache.batch_size, dtype=torch.int64, device=self._device)

    def prefill(self, input_ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """Take several tokens a row in one pass, after those that the cache holds.

        Args:
            input_ids: (B, S) int64, S >= 1.
            padding: (B,) int64, how many tokens at the start of each row are no text. Only in an empty cache.

        Returns:
            Logits (B, vocabulary) of the last token.

        Raises:
            ConfigError: the batch has another size, the tokens don't fit the cache, or padding comes after text.
        """
        if padding is not None:
            if self._tokens:
                raise ConfigError("padding can stand before the first token only; call reset() for a new text")
            self._padding = padding.to(self._device, torch.int64)
        return self._run(self._prefill, input_ids)

    def decode(self, tokens: Tensor) -> Tensor:
        """Take one token a row, (B, 1) int64; returns logits (B, vocabulary). Errors as `prefill`."""
        return self._run(self._decode, tokens)

    @torch.no_grad()
    def _run(self, program: Callable[..., Tensor], input_ids: Tensor) -> Tensor:
        rows, count = input_ids.shape
        if rows != self.cache.batch_size:
            raise ConfigError(
                f"{rows} rows of tokens for programs of batch size {self.cache.batch_size}: export with "
                f"batch_size={rows}"
            )
        end = self._tokens + count
        if end > self.cache.max_cache_len:
            raise ConfigError(
                f"{end} tokens, prompt included, don't fit the cache of {self.cache.max_cache_len}: shorten the "
                "prompt, ask for fewer tokens, or export with a larger max_cache_len"
            )
        position = torch.tensor([self._tokens], device=self._device, dtype=torch.int64)
        slots = self._slots[: max(end, 2)]
        logits = program(input_ids.to(self._device), position, self._padding, slots, self._keys, self._values)
        self._tokens = end
        return logits


class Recompute:
    """`TokenModel` of one row from a program without a cache: the whole prefix runs again for every token.

    Args:
        program: token ids (1, S) int64 -> logits (1, S, vocabulary), S dynamic. An exported one gets ids on the device
            of its tensors, anything else on the CPU.
    """

    batch_size = 1

    def __init__(self, program: ExportedProgram | Callable[[Tensor], Tensor]) -> None:
        self._device = home_of(program) if isinstance(program, ExportedProgram) else torch.device("cpu")
        self._run = _module(program) if isinstance(program, ExportedProgram) else program
        self.rows = table_rows(self._run) if isinstance(self._run, GraphModule) else None
        # Most tokens that the program was exported for.
        self.max_cache_len: float = math.inf
        if isinstance(program, ExportedProgram):
            self.max_cache_len = size_ranges(program, user_placeholders(program)[0])[-1][1]
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._ids = torch.zeros(1, 0, dtype=torch.int64, device="cpu")

    def prefill(self, input_ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """As `TokenModel.prefill`; one row is never padded."""
        if padding is not None and padding.any():
            raise ConfigError("a program without a cache takes one prompt, which is never padded; leave padding out")
        self._ids = torch.cat([self._ids, input_ids], 1)
        with torch.no_grad():
            return self._run(self._ids.to(self._device))[:, -1]

    def decode(self, tokens: Tensor) -> Tensor:
        """As `TokenModel.decode`."""
        return self.prefill(tokens)


def _module(program: ExportedProgram) -> Callable[..., Tensor]:
    return program.module()
