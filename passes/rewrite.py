"""Replace each calibrated Linear by rotate → project → packed_linear, and embeddings tied to it by packed_embedding."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.passes.base import ProgramPass, counters
from lopro_fx.passes.calls import PACKED_EMBEDDING, PACKED_LINEAR, PROJECT, ROTATE
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.mutation import written_between
from lopro_fx.passes.operands import Operands
from lopro_fx.passes.packed import PackedGroup, PackedSite
from lopro_fx.passes.record import META, Mark, sites_of
from lopro_fx.passes.sites import Site, find_sites
from lopro_fx.passes.ties import identity

_Buffers = Mapping[str, dict[str, Node]]


class _Input(NamedTuple):
    """What the sites of a group read instead of one value, and the last of them so far.

    It is `computed` unless they read the value itself.
    """

    rotated: Node
    latent: Node | None
    reader: Node
    computed: bool


class RewritePass(ProgramPass):
    """Rewrites every site of `sites` that the program has.

    Embeddings that share the weight of a site with `embedding` look up its packed rows.

    Args:
        groups: packed groups by name.
        sites: packed sites by FQN; each must exist in the program with the same shape.
        info: stored as the program's own record.

    Raises:
        GraphError: the program lacks a site, or a shape differs.
    """

    name = "rewrite"

    def __init__(
        self, groups: Mapping[str, PackedGroup], sites: Mapping[str, PackedSite], info: Mapping[str, Any]
    ) -> None:
        self._groups, self._sites, self._info = groups, sites, info

    def requires(self, program: ExportedProgram) -> None:
        found = _all_sites(program, self._sites)
        missing = [name for name in self._sites if name not in found]
        if missing:
            raise GraphError(
                f"the program has no Linear '{missing[0]}' ({len(missing)} of {len(self._sites)} calibrated layers are "
                "missing); was it exported from the same model, and not quantised or decomposed yet?"
            )
        for name, packed in self._sites.items():
            have = (found[name].out_features, found[name].in_features)
            want = (packed.out_features, packed.in_features)
            if have != want:
                raise GraphError(f"Linear '{name}' has a weight of {have}, but was calibrated as {want}")

    def call(self, program: ExportedProgram) -> ExportedProgram:
        found = _all_sites(program, self._sites)
        editor = ProgramEditor(program)
        shared, own = _add_buffers(editor, self._groups), _add_buffers(editor, self._sites)
        inputs: dict[tuple[str, Node], _Input] = {}
        # Graph order: the first reader of an input places the rotation, so it stands before all of them.
        order = {node: index for index, node in enumerate(editor.graph.nodes)}
        uses = [(editor.by_name[node.name], site) for site in self._ordered(found) for node in site.nodes]
        for node, site in sorted(uses, key=lambda use: order[use[0]]):
            self._rewrite(editor, node, site, own[site.name], shared, inputs)
            counters["rewrite.linear"] += 1
        for name, packed in self._sites.items():
            for node in found[name].embeddings if packed.embedding else ():
                _look_up(editor, editor.by_name[node.name], packed, own[name])
                counters["rewrite.embedding"] += 1
        _drop_weights(editor, {found[name].weight for name in self._sites})
        editor.graph_module.meta[META] = dict(self._info)
        return editor.finish()

    def ensures(self, program: ExportedProgram) -> None:
        calls = program.graph.find_nodes(op="call_function", target=PACKED_LINEAR)
        done = {name for node in calls for name in sites_of(node)}
        for name in self._sites:
            self.promise(name in done, f"'{name}' is not packed")

    def _ordered(self, found: Mapping[str, Site]) -> list[Site]:
        return [found[name] for name in self._sites]

    def _rewrite(
        self,
        editor: ProgramEditor,
        linear: Node,
        site: Site,
        own: Mapping[str, Node],
        shared: _Buffers,
        inputs: dict[tuple[str, Node], _Input],
    ) -> None:
        packed = self._sites[site.name]
        group = self._groups[packed.group]
        source = linear.args[0]
        bias = linear.args[2] if len(linear.args) > 2 else None
        assert isinstance(source, Node)
        known = inputs.get((group.name, source))
        # A value that was written meanwhile, through a view of it, is another one.
        if known is None or (known.computed and written_between(source, known.reader, linear)):
            rotated, latent = self._input_side(editor, linear, source, group, shared[group.name])
        else:
            rotated, latent = known.rotated, known.latent
        operands = Operands.of(
            PACKED_LINEAR, x=rotated, bias=bias, latent=latent if "up" in own else None, bits=packed.bits,
            group_size=packed.group_size, **own,
        )  # fmt: skip
        call = editor.add_operator(linear, f"packed_{linear.name}", operands, linear)
        call.meta[META] = Mark(site=site.name, group=group.name, bits=packed.bits)
        inputs[group.name, source] = _Input(rotated, latent, call, rotated is not source or latent is not None)
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
        group: PackedGroup,
        shared: Mapping[str, Node],
    ) -> tuple[Node, Node | None]:
        """Rotation and down-projection of one input, placed before its first reader; the latent is None at rank 0."""

        def add(kind: str, operands: Operands) -> Node:
            node = editor.add_operator(before, f"{kind}_{before.name}", operands, before)
            # Several modules read the value, so it belongs to the innermost one around them all.
            if len(group.members) > 1 and "nn_module_stack" in node.meta:
                node.meta["nn_module_stack"] = enclosing(node.meta["nn_module_stack"], group.members)
            node.meta[META] = Mark(group=group.name)
            counters[f"rewrite.{kind}"] += 1
            return node

        rotated = source
        if group.rotates:
            turn = {"perm": shared.get("perm"), "signs": shared.get("signs"), "block": group.block, "skip": group.skip}
            rotated = add("rotate", Operands.of(ROTATE, x=source, **turn))
        if "down" not in shared:
            return rotated, None
        project = Operands.of(PROJECT, x=rotated, down=shared["down"], scale=shared.get("down_scale"))
        return rotated, add("project", project)


def _add_buffers(editor: ProgramEditor, owners: Mapping[str, PackedGroup] | Mapping[str, PackedSite]) -> _Buffers:
    """Placeholders of the owners' tensors, by the names of owner and tensor."""
    return {
        name: {key: editor.add_buffer(f"{owner.name}.{key}", tensor) for key, tensor in owner.tensors.items()}
        for name, owner in owners.items()
    }


def _look_up(editor: ProgramEditor, embedding: Node, packed: PackedSite, own: Mapping[str, Node]) -> None:
    table = {key: own[key] for key in ("codes", "scales", "zeros")}
    lookup = Operands.of(
        PACKED_EMBEDDING, ids=embedding.args[1], bits=packed.bits, group_size=packed.group_size,
        in_features=packed.in_features, dtype=embedding.meta["val"].dtype, **table,
    )  # fmt: skip
    call = editor.add_operator(embedding, f"packed_{embedding.name}", lookup, embedding)
    call.meta[META] = Mark(site=packed.name, group=packed.group, bits=packed.bits)
    editor.replace(embedding, call)


def _drop_weights(editor: ProgramEditor, weights: Set[str]) -> None:
    """Remove those of the named weights that nothing reads any more, under every name that they have."""
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
    """Every Linear with a parameter, the output projection included, by FQN: by the `wanted` one of several that a tied
    weight has, for programs that don't tell which module computes a Linear."""
    found = {}
    for site in find_sites(program, keep=False).sites:
        name = next((name for name in (site.name, *site.owners) if name in wanted), site.name)
        found[name] = replace(site, name=name)
    return found
