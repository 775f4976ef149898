"""Pack a quantised transformers model, and save it as a folder that transformers loads."""

from __future__ import annotations

import copy
import re
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

from lopro_fx.errors import CheckpointError, ConfigError
from lopro_fx.huggingface import layout
from lopro_fx.huggingface.listing import REPORT, list_files, written
from lopro_fx.huggingface.replace import replace_modules, tied_embeddings, untie
from lopro_fx.huggingface.unpacked import beside_packed, put_weights, without_others
from lopro_fx.huggingface.versions import require_transformers
from lopro_fx.kernels.activation.delivery import DEFAULT
from lopro_fx.models.quiet import quiet
from lopro_fx.state import QuantState
from lopro_fx.store.files import recover, replacing, require_writable, write_json
from lopro_fx.store.reading import entry, read_json
from lopro_fx.store.records import timeless

_CONFIG = "config.json"


def pack_model(model: Any, state: QuantState, *, activations: str = DEFAULT) -> Any:
    """Copy a transformers model, with packed Linears and experts; the copy shares all else with `model`.

    With `head_bits`, an embedding that is tied to the output projection is packed too. Quantised weights that are no
    Linear's or experts' in transformers, such as a router's parameter, are rounded but kept dense, with a warning.

    Args:
        model: the `PreTrainedModel` that `state` was calibrated on, through `export_causal_lm` or any other export. Its
            weights that `state` replaces are not read.
        state: from `lopro_fx.calibrate`.
        activations: "int8" to round each token's rotated activations inside the CPU kernel, or "float" to keep them. It
            is stored, `from_pretrained(quantization_config=LoProConfig(...))` overrides it, and a GPU rounds none.

    Returns:
        A model for `generate`, `pipeline`, `torch.compile` and `save_pretrained`.

    Raises:
        ConfigError: `activations` is none of the two.
        ModelError: transformers is missing or too old, or `state` names a weight that the model lacks.
    """
    return _pack(model, state, activations)[0]


def save_pretrained(
    model: Any,
    state: QuantState,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    activations: str = DEFAULT,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads once `lopro_fx` is imported.

    It holds `config.json` with the quantisation's configuration, `generation_config.json`, weights in safetensors
    shards with an index, the tokenizer's files, and `lopro_fx_report.json`: the report of each layer, and the size and
    SHA-256 of every other file. Unquantised tensors keep their dtype; tied weights stay tied.

    Args:
        model, state, activations: as in `pack_model`.
        folder: new, empty, or a folder that this function wrote. Its files are then replaced, others in it stay.
        tokenizer: written too, if given.
        max_shard_size: bytes, or a text such as "500MB" or "5GB".

    Raises:
        CheckpointError: `folder` holds something else, or can't be written (nothing is left half-written).
        ConfigError: `max_shard_size` is no size; else as in `pack_model`.
        ModelError: as in `pack_model`.
    """
    folder = Path(folder)
    size = shard_bytes(max_shard_size)
    require_replaceable(folder)
    packed, state = _pack(model, state, activations)
    with replacing(folder, written) as temporary, quiet():
        packed.save_pretrained(temporary, max_shard_size=size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_json(temporary / REPORT, {**_report(state), "files": list_files(temporary)})


def _pack(model: Any, state: QuantState, activations: str) -> tuple[Any, QuantState]:
    """Return `pack_model`'s model, and the part of the state that it holds packed."""
    require_transformers("a packed transformers model")
    from lopro_fx.huggingface.quantizer import LoProConfig, attach

    state, dense = without_others(model, state)
    embeddings = tied_embeddings(model, state.layers)
    dense |= beside_packed(model, state, embeddings)
    if dense:
        warnings.warn(
            f"{len(dense)} quantised weights are stored dense, since transformers has nothing there to pack, first "
            f"'{next(iter(dense))}'; exclude them to keep them as they were",
            stacklevel=3,
        )
    inputs, layers = layout.describe(state, embeddings)
    config = LoProConfig(activations, method=state.config, inputs=inputs, layers=layers)
    # With all tensors in its memo, the copy copies modules only.
    kept = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    packed = copy.deepcopy(model, kept)
    put_weights(packed, dense)
    untie(packed, {*state.layers, *chain(*embeddings.values())})
    replace_modules(packed, state.inputs, state.layers, embeddings, activations)
    attach(packed, config)
    return packed.eval(), state


def _report(state: QuantState) -> dict[str, Any]:
    return {
        "config": state.config,
        "info": timeless(state.info),
        "layers": [{"name": name, **timeless(layer.metrics)} for name, layer in state.layers.items()],
        "skipped": [list(item) for item in state.skipped],
        "weights": state.weights,
        "packed_bytes": state.packed_bytes,
        "bits_per_weight": state.bits_per_weight,
    }


def shard_bytes(size: int | str) -> int:
    """Parse a size as transformers writes it, to bytes.

    Raises:
        ConfigError: it is no size, or below 1 byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", str(size), re.IGNORECASE | re.ASCII)
    count = int(float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " ")) if match else 0
    if count < 1:
        raise ConfigError(f"max_shard_size={size}: give bytes, or a number with KB, MB, GB or TB, such as 5GB")
    return count


def require_replaceable(folder: Path) -> None:
    """Refuse a folder that this module has not written, or that can't be written.

    Raises:
        CheckpointError: it is one.
    """
    recover(folder)
    require_writable(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        config = read_json(folder / _CONFIG, dict)
        ours = entry(config, "quantization_config", dict, folder / _CONFIG).get("quant_method") == "lopro_fx"
    except CheckpointError:
        ours = False
    if not ours:
        raise CheckpointError(f"{folder} exists and was not written by lopro_fx; name another folder or delete it")
