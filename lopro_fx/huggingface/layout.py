"""Layout of a quantised state without its tensors, as JSON for `config.json`.

It is the result of `records.describe` without the metrics. Each layer also names the embedding that holds its weight,
if any ("embedding"), and the others that read it ("readers").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lopro_fx.layer import Input, Layer
from lopro_fx.state import QuantState
from lopro_fx.store import records


def describe(state: QuantState, embeddings: Mapping[str, Sequence[str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe every input and every layer by name, as JSON for `restore`.

    Args:
        state: what to describe.
        embeddings: names of the embeddings that read a layer's weight, by the layer's name; the first holds it.
    """
    record = records.describe(state.inputs.values(), state.layers.values())
    for name, entry in record["layers"].items():
        del entry["metrics"]
        readers = list(embeddings.get(name, ()))
        entry |= {"embedding": readers[0] if readers else None, "readers": readers[1:]}
    return record["inputs"], record["layers"]


def restore(inputs: Mapping[str, Any], layers: Mapping[str, Any]) -> tuple[dict[str, Input], dict[str, Layer]]:
    """Make inputs and layers from a description, with tensors on the meta device.

    Readers that are none of the layers are dropped, and so are inputs without readers.

    Raises:
        KeyError: an entry is missing.
        ConfigError: a format isn't registered.
    """
    readers: dict[str, list[str]] = {}
    for name, entry in layers.items():
        readers.setdefault(entry["input"], []).append(name)
    found = {name: {**inputs[name], "readers": own} for name, own in readers.items()}
    return records.restore({"inputs": found, "layers": layers}, records.on_meta)


def from_version_1(
    groups: Mapping[str, Any], sites: Mapping[str, Any], size: Callable[[str], tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert descriptions that lopro_fx 0.1 wrote, whose weights are all "affine".

    Args:
        groups, sites: as they stand in `config.json`.
        size: (out_features, in_features) of a Linear of the model by name.

    Raises:
        KeyError: an entry is missing.
    """
    inputs, layers = {}, {}
    for name, entry in sites.items():
        group, (rows, columns) = groups[entry["group"]], size(name)
        # The earliest folders don't name the dtypes of scales.
        scale = "float16" if group["factors"] == "int8" else None
        narrow = "int16" if columns <= 2**15 else "int32"
        shared = {"perm": narrow if group["perm"] else None, "signs": "uint8" if group["signs"] else None,
                  "down": group["factors"], "down_scale": group.get("down_scale", scale)}  # fmt: skip
        own = {"codes": "int32", "scales": entry.get("scales", "float16"), "zeros": "int32",
               "up": group["factors"], "up_scale": entry.get("up_scale", scale)}  # fmt: skip
        sizes = {key: group[key] for key in ("block", "skip", "rank")}
        inputs[entry["group"]] = {"readers": [], "in_features": columns, **sizes, "tensors": _given(shared)}
        layers[name] = {
            "input": entry["group"],
            "format": "affine",
            "shape": [rows, columns],
            "spec": {"bits": entry["bits"], "group_size": entry["group_size"]},
            "tensors": _given(own),
            "embedding": entry["embedding"],
            "readers": entry.get("readers", []),
        }
    return inputs, layers


def _given(dtypes: Mapping[str, str | None]) -> dict[str, str]:
    return {key: dtype for key, dtype in dtypes.items() if dtype is not None}
