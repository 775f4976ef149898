"""Export the prefill and decode programs of a Hugging Face causal language model, with a static KV cache."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from lopro_fx.errors import ConfigError, ModelError, first_line
from lopro_fx.generation.attention import grouped_attention_in
from lopro_fx.generation.cache import BITS, restored, stored
from lopro_fx.generation.programs import CacheSpec, GenerationPrograms
from lopro_fx.models.export import export_view
from lopro_fx.models.masks import Form, Misuse, check_masks
from lopro_fx.models.positions import configured_limit, positions_given, table_limit, table_of_slots
from lopro_fx.models.routed import routed_experts_in
from lopro_fx.passes import compat

_FULL, _SLIDING = "full_attention", "sliding_attention"


def export_for_generation(
    model: Any, *, max_cache_len: int, batch_size: int = 1, cache_bits: int = 0
) -> GenerationPrograms:
    """Export a model as the two programs that generate text with a KV cache.

    Their weights are named as in the model, so a `QuantState` calibrated on `export_causal_lm`'s program fits both:
    `export_for_generation(model, …).map(lambda program: lopro_fx.apply(program, state))`.

    Args:
        model: a causal language model of transformers, in eval mode.
        max_cache_len: most tokens of prompt and text together, at least 2. A longer cache costs memory; time grows only
            with the tokens in it.
        batch_size: rows that are generated together.
        cache_bits: 8 or 4 rounds keys and values to so many bits, with a step and an offset for each token and head; 0
            keeps the model's dtype.

    Raises:
        ConfigError: a size is out of range.
        ModelError: the model has layers without a plain KV cache (recurrent or chunked ones) or an attention that takes
            no masks, or can't be traced.
    """
    if max_cache_len < 2 or batch_size < 1:
        raise ConfigError(f"max_cache_len={max_cache_len}, batch_size={batch_size}: at least 2 and 1 are needed")
    if type(cache_bits) is not int or cache_bits not in BITS:
        raise ConfigError(f"cache_bits={cache_bits!r}: allowed are {', '.join(map(str, BITS))}")
    limit = table_limit(model) or configured_limit(model)
    if limit is not None and max_cache_len > limit:
        raise ConfigError(f"max_cache_len={max_cache_len}: this model knows positions up to {limit}")
    windows, attempts = _windows(model.config.get_text_config(decoder=True)), _attempts(model)
    spec = replace(_cache_spec(model, batch_size, max_cache_len), bits=cache_bits)
    odd = next((width for _, width in (*spec.keys, *spec.values) if width % 2), None)
    if cache_bits and odd is not None:
        raise ModelError(f"{type(model).__name__} has heads of {odd} columns; cache_bits needs an even number")
    reasons: list[Misuse | ModelError] = []
    for dtype, in_tables in attempts:
        forward = _forward(type(model).forward, windows, dtype, in_tables, spec)
        try:
            return _programs(model, spec, forward)
        except (Misuse, ModelError) as error:
            reasons.append(error)
    if isinstance(reasons[0], ModelError):
        raise reasons[0]
    raise ModelError(
        f"{type(model).__name__} can't be exported with a cache: it doesn't take masks as transformers' other models "
        f"do, {reasons[0]}"
    ) from reasons[0]


def _programs(model: nn.Module, spec: CacheSpec, forward: Any) -> GenerationPrograms:
    """Export both programs. Raises: Misuse if the model reads masks in another form; ModelError."""
    device = next(model.parameters()).device

    def example(tokens: int) -> tuple[Any, ...]:
        zeros = torch.zeros(spec.batch_size, tokens, dtype=torch.int64, device="cpu")
        keys, values = spec.allocate(device)
        small = (
            zeros,
            torch.zeros(1, dtype=torch.int64, device="cpu"),
            zeros[:, 0].clone(),
            torch.arange(tokens + 2, dtype=torch.int64, device="cpu"),
        )
        return (*(tensor.to(device) for tensor in small), keys, values)

    tokens, slots = Dim("tokens", min=1, max=spec.max_cache_len), Dim("slots", min=2, max=spec.max_cache_len)
    caches = {"keys": [None] * len(spec.keys), "values": [None] * len(spec.values)}
    shapes: dict[str, Any] = {"input_ids": None, "position": None, "padding": None, "slots": {0: slots}, **caches}
    prefill = export_view(model, forward, example(3), {**shapes, "input_ids": {1: tokens}})
    with grouped_attention_in(model):
        decode = export_view(model, forward, example(1), shapes)
    for program in (prefill, decode):
        check_masks(program, "padding", Form.VISIBLE, len(spec.keys))
        if spec.batch_size > 1 and (table := table_of_slots(program)) is not None:
            raise ModelError(
                f"{type(model).__name__} can't be exported with batch_size={spec.batch_size}: '{table}' counts padding "
                "as text, so rows of different lengths would come out wrong: export with batch_size=1"
            )
    return GenerationPrograms(prefill, decode, spec)


def _forward(
    plain_forward: Any, windows: dict[str, int | None], mask_dtype: torch.dtype, in_tables: bool, spec: CacheSpec
) -> Any:
    takes = inspect.signature(plain_forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def forward(
        self: Any, input_ids: Tensor, position: Tensor, padding: Tensor, slots: Tensor, keys: Any, values: Any
    ) -> Tensor:
        written = position + torch.arange(input_ids.shape[1], dtype=torch.int64, device=position.device)
        places = (written - padding[:, None]).clamp(min=0)
        with positions_given(self, takes, places, in_tables) as positions:
            output = plain_forward(
                self,
                input_ids=input_ids,
                attention_mask=_masks(written, padding, slots, windows, mask_dtype),
                past_key_values=_cache(written, slots.shape[0], keys, values, spec),
                use_cache=True,
                **positions,
                **last,
            )
        return output.logits[:, -1]

    return forward


def _masks(written: Tensor, padding: Tensor, slots: Tensor, windows: dict[str, int | None], dtype: torch.dtype) -> Any:
    """Build masks (B, 1, S, L): a token may look at itself and at the text before it.

    Boolean masks are True there; floating-point ones, added to scores, are 0 there. An integer mask is (B, L), 1 where
    there is text; the model makes its own of it.
    """
    if dtype == torch.int64:
        return (slots >= padding[:, None]).to(dtype)
    mine, others = written[:, None], slots[None, :]
    # A padding token looks at itself alone: a row of the softmax with nothing in it would be NaN.
    visible = ((others <= mine) & (others >= padding[:, None, None])) | (others == mine)
    masks = {
        kind: (visible if window is None else visible & (others > mine - window))[:, None]
        for kind, window in windows.items()
    }
    if dtype != torch.bool:
        least = torch.finfo(dtype).min
        masks = {kind: torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, least) for kind, mask in masks.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _cache(written: Tensor, length: int, keys: Any, values: Any, spec: CacheSpec) -> Any:
    """Wrap the programs' own tensors as a cache of transformers."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class Slots(CacheLayerMixin):
        is_sliding = False

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values, self.is_initialized = keys, values, True
            self._cache = keys, values

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
            raise AssertionError("the tensors are there from the start")

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            keys, values = self._cache
            return self._through(keys, key_states), self._through(values, value_states)

        @staticmethod
        def _through(cache: Tensor, states: Tensor) -> Tensor:
            """Write the states, and read what the cache holds."""
            if not spec.bits:
                cache.index_copy_(2, written, states)
                return cache[:, :, :length]
            cache.index_copy_(2, written, stored(states, spec.bits))
            return restored(cache[:, :, :length], states.shape[-1], spec.bits, states.dtype)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
            return length, 0

        def get_seq_length(self) -> Any:
            return written[0]

        def get_max_length(self) -> int:
            return self._cache[0].shape[2]

    return Cache(layers=[Slots(key, value) for key, value in zip(keys, values, strict=True)])


def _attempts(model: Any) -> list[tuple[torch.dtype, bool]]:
    """Mask dtypes to try, first the one that the model's attention should take, each with whether position tables look
    up given positions; last without."""
    kind = model.config.get_text_config(decoder=True)._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise ModelError(f"attn_implementation='{kind}' takes no masks; load the model with 'sdpa' or 'eager'")
    dtypes = (torch.bool, model.dtype) if kind == "sdpa" else (model.dtype, torch.bool)
    return [*((dtype, True) for dtype in (*dtypes, torch.int64)), (dtypes[0], False)]


def _windows(config: Any) -> dict[str, int | None]:
    """Window of each kind of attention layer in tokens; None is unlimited."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [_SLIDING if window is not None else _FULL]
    if getattr(config, "use_sliding_window", True) is False and getattr(config, "layer_types", None) is None:
        kinds = [_FULL]
    unknown = sorted(set(kinds) - {_FULL, _SLIDING})
    if unknown:
        raise ModelError(f"layers of type {', '.join(unknown)} keep no plain KV cache; they can't be exported with one")
    return {kind: None if kind == _FULL else window for kind in dict.fromkeys(kinds)}


def _cache_spec(model: nn.Module, batch_size: int, max_cache_len: int) -> CacheSpec:
    """Take sizes from the model's own cache after one token, run on fake tensors."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        # transformers' default for experts can't be run on fake tensors in fp32.
        with torch.no_grad(), compat.fake_tensors(), routed_experts_in(model):
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        # Decoders of encoder-decoder models keep a cache for self-attention and one for cross-attention.
        cache = getattr(output.past_key_values, "self_attention_cache", output.past_key_values)
        layers = [layer for layer in cache.layers if layer.keys is not None]
        keys = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers]
        values = [(layer.values.shape[1], layer.values.shape[3]) for layer in layers]
        dtype = str(layers[0].keys.dtype).removeprefix("torch.")
    except Exception as error:  # running the model's own code may raise anything
        raise ModelError(f"{type(model).__name__} keeps no plain KV cache: {first_line(error)}") from error
    return CacheSpec(batch_size, max_cache_len, keys, values, dtype, output.logits.shape[-1])
