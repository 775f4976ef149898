"""Replace each calibrated Linear by rotate → project, round_activation → packed linear, and experts likewise; tied
embeddings by lookups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.kernels.formats.registry import operator_of
from lopro_fx.layer import Input, Layer
from lopro_fx.passes.base import ProgramPass, counters
from lopro_fx.passes.calls import PROJECT, ROTATE, ROUND, packed_calls
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.mutation import written_between
from lopro_fx.passes.operands import Operands
from lopro_fx.passes.record import META, Mark, sites_of
from lopro_fx.passes.sites import Site, find_sites
from lopro_fx.passes.ties import identity

_Buffers = Mapping[str, dict[str, Node]]


class _Shared(NamedTuple):
    """Replacement of an input value for its layers, and the last `reader` so far.

    `computed` is False if the layers read the value itself.
    """

    rotated: Node
    latent: Node | None
    reader: Node
    computed: bool


class RewritePass(ProgramPass):
    """Rewrite every layer of `layers`.

    Embeddings tied to a layer whose `embedding` is set look up its packed rows.

    Args:
        inputs: by name.
        layers: by FQN; each must exist in the program with the same shape.
        info: stored as the program's own record.

    Raises:
        GraphError: the program lacks a layer, or a shape differs.
    """

    name = "rewrite"

    def __init__(self, inputs: Mapping[str, Input], layers: Mapping[str, Layer], info: Mapping[str, Any]) -> None:
        self._inputs, self._layers, self._info = inputs, layers, info

    def requires(self, program: ExportedProgram) -> None:
        found = _all_sites(program, self._layers)
        missing = [name for name in self._layers if name not in found]
        if missing:
            raise GraphError(
                f"the program has no Linear '{missing[0]}' ({len(missing)} of {len(self._layers)} calibrated layers "
                "are missing); was it exported from the same model, and not quantised or decomposed yet?"
            )
        for name, packed in self._layers.items():
            have, want = found[name].shape, tuple(packed.weight.shape)
            if have != want:
                raise GraphError(f"Linear '{name}' has a weight of {have}, but was calibrated as {want}")

    def call(self, program: ExportedProgram) -> ExportedProgram:
        found = _all_sites(program, self._layers)
        editor = ProgramEditor(program)
        shared, own = _add_buffers(editor, self._inputs), _add_buffers(editor, self._layers)
        inputs: dict[tuple[str, Node], _Shared] = {}
        # Graph order: the first reader of an input places the rotation, so it stands before all of them.
        order = {node: index for index, node in enumerate(editor.graph.nodes)}
        uses = [(editor.by_name[node.name], site) for site in self._ordered(found) for node in site.nodes]
        for node, site in sorted(uses, key=lambda use: order[use[0]]):
            self._rewrite(editor, node, site, own[site.name], shared, inputs)
            counters["rewrite.experts" if site.experts else "rewrite.linear"] += 1
        for name, packed in self._layers.items():
            for node in found[name].embeddings if packed.embedding else ():
                _look_up(editor, editor.by_name[node.name], packed, own[name])
                counters["rewrite.embedding"] += 1
        _drop_weights(editor, {found[name].weight for name in self._layers})
        editor.graph_module.meta[META] = dict(self._info)
        return editor.finish()

    def ensures(self, program: ExportedProgram) -> None:
        done = {name for node in packed_calls(program.graph, "linear", "experts") for name in sites_of(node)}
        for name in self._layers:
            self.promise(name in done, f"'{name}' is not packed")

    def _ordered(self, found: Mapping[str, Site]) -> list[Site]:
        return [found[name] for name in self._layers]

    def _rewrite(
        self,
        editor: ProgramEditor,
        linear: Node,
        site: Site,
        own: Mapping[str, Node],
        shared: _Buffers,
        inputs: dict[tuple[str, Node], _Shared],
    ) -> None:
        layer = self._layers[site.name]
        group = self._inputs[layer.input]
        source = linear.args[0]
        assert isinstance(source, Node)
        known = inputs.get((group.name, source))
        # A value that was written in place since is another one.
        if known is None or (known.computed and written_between(source, known.reader, linear)):
            rotated, latent = self._input_side(editor, linear, source, group, shared[group.name])
        else:
            rotated, latent = known.rotated, known.latent
        if site.experts:
            kind, others = "experts", {"ids": linear.args[1], "slots": linear.args[3]}
        else:
            kind, others = "linear", {"bias": linear.args[2] if len(linear.args) > 2 else None}
        operands = Operands.of(
            operator_of(layer.weight.format, kind), x=rotated, latent=None if layer.up is None else latent,
            **layer.weight.spec, **own, **others,
        )  # fmt: skip
        call = editor.add_operator(linear, f"packed_{linear.name}", operands, linear)
        call.meta[META] = Mark(site=site.name, group=group.name)
        inputs[group.name, source] = _Shared(rotated, latent, call, rotated is not source or latent is not None)
        # Its input and bias have readers; its weight may be a view that now has none.
        read = linear.all_input_nodes
        editor.replace(linear, call)
        for operand in read:
            editor.erase_unread(operand)

    def _input_side(
        self,
        editor: ProgramEditor,
        before: Node,
        source: Node,
        group: Input,
        shared: Mapping[str, Node],
    ) -> tuple[Node, Node | None]:
        """Insert the nodes of an input; return what its packed weights read, and the latent (None at rank 0)."""

        def add(kind: str, operands: Operands) -> Node:
            node = editor.add_operator(before, f"{kind}_{before.name}", operands, before)
            # Several modules read the value: it belongs to the innermost module that contains them all.
            if len(group.readers) > 1 and "nn_module_stack" in node.meta:
                node.meta["nn_module_stack"] = enclosing(node.meta["nn_module_stack"], group.readers)
            node.meta[META] = Mark(group=group.name)
            counters[f"rewrite.{kind}"] += 1
            return node

        rotated, transform = source, group.transform
        if not transform.is_identity:
            turn = {"perm": shared.get("perm"), "signs": shared.get("signs")}
            rotated = add("rotate", Operands.of(ROTATE, x=source, block=transform.block, skip=transform.skip, **turn))
        latent, rounded = None, rotated
        if "down" in shared:
            project = Operands.of(PROJECT, x=rotated, down=shared["down"], scale=shared.get("down_scale"))
            latent = add("project", project)
        if (activation := group.activation) is not None:
            operands = Operands.of(ROUND, x=rotated, bits=activation.bits, group=activation.group)
            rounded = add("round_activation", operands)
        return rounded, latent


def _add_buffers(editor: ProgramEditor, owners: Mapping[str, Input] | Mapping[str, Layer]) -> _Buffers:
    """Placeholders of the owners' tensors, by the names of owner and tensor."""
    return {
        name: {key: editor.add_buffer(f"{owner.name}.{key}", tensor) for key, tensor in owner.tensors.items()}
        for name, owner in owners.items()
    }


def _look_up(editor: ProgramEditor, embedding: Node, layer: Layer, own: Mapping[str, Node]) -> None:
    lookup = Operands.of(
        operator_of(layer.weight.format, "embedding"), ids=embedding.args[1], in_features=layer.in_features,
        dtype=embedding.meta["val"].dtype, **layer.weight.spec, **{key: own[key] for key in layer.weight.tensors},
    )  # fmt: skip
    call = editor.add_operator(embedding, f"packed_{embedding.name}", lookup, embedding)
    call.meta[META] = Mark(site=layer.name, group=layer.input)
    editor.replace(embedding, call)


def _drop_weights(editor: ProgramEditor, weights: Set[str]) -> None:
    """Remove named weights that nothing reads any more, under all their tied names."""
    names: dict[Any, list[Node]] = {}
    for placeholder in editor.graph.find_nodes(op="placeholder"):
        tensor = editor.tensor(placeholder)
        if tensor is not None:
            names.setdefault(identity(tensor), []).append(placeholder)
    dropped = set()
    for key, tied in names.items():
        if any(editor.fqn(name) in weights for name in tied) and not any(name.users for name in tied):
            dropped.add(key)
            for name in tied:
                editor.drop_unused_weight(name)
    editor.drop_unlisted(dropped)


def enclosing(stack: Mapping[str, Any], members: tuple[str, ...]) -> dict[str, Any]:
    """The part of an `nn_module_stack` whose modules contain every member."""
    parents = [name.split(".")[:-1] for name in members]
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))]
    kept = {}
    for key, entry in stack.items():
        path = entry[0].split(".") if entry[0] else []
        if path == common[: len(path)]:
            kept[key] = entry
    return kept


def _all_sites(program: ExportedProgram, wanted: Collection[str]) -> dict[str, Site]:
    """Every Linear with a parameter by FQN, output projections included. A tied weight goes by its `wanted` name: some
    programs don't tell which module computes a Linear."""
    found = {}
    for site in find_sites(program, keep=False).sites:
        name = next((name for name in (site.name, *site.owners) if name in wanted), site.name)
        found[name] = replace(site, name=name)
    return found
