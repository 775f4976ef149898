"""Replace each calibrated Linear by rotate → project → packed_linear, and embeddings tied to it by packed_embedding."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.passes.base import ProgramPass, counters
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.mutation import written_between
from lopro_fx.passes.packed import PackedGroup, PackedSite
from lopro_fx.passes.sites import Site, find_sites
from lopro_fx.passes.ties import identity

# Where a program keeps what was done to it: `graph_module.meta[META]` for the whole, `node.meta[META]` for a node.
META = "lopro_fx"


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
        buffers = {
            (owner.name, key): editor.add_buffer(f"{owner.name}.{key}", tensor)
            for owner in (*self._groups.values(), *self._sites.values())
            for key, tensor in owner.tensors.items()
        }
        shared: dict[tuple[str, Node], tuple[Node, Node | None]] = {}
        # Graph order: the first reader of an input places the rotation, so it stands before all of them.
        order = {node: index for index, node in enumerate(editor.graph.nodes)}
        uses = [(editor.by_name[node.name], site) for site in self._ordered(found) for node in site.nodes]
        for node, site in sorted(uses, key=lambda use: order[use[0]]):
            self._rewrite(editor, node, site, buffers, shared)
            counters["rewrite.linear"] += 1
        for name, packed in self._sites.items():
            for node in found[name].embeddings if packed.embedding else ():
                _look_up(editor, editor.by_name[node.name], packed, buffers)
                counters["rewrite.embedding"] += 1
        _drop_weights(editor, {found[name].weight for name in self._sites})
        editor.graph_module.meta[META] = dict(self._info)
        return editor.finish()

    def ensures(self, program: ExportedProgram) -> None:
        packed = torch.ops.lopro.packed_linear.default
        done = {node.meta[META]["site"] for node in program.graph.find_nodes(op="call_function", target=packed)}
        assert done >= set(self._sites), set(self._sites) - done

    def _ordered(self, found: Mapping[str, Site]) -> list[Site]:
        return [found[name] for name in self._sites]

    def _rewrite(
        self,
        editor: ProgramEditor,
        linear: Node,
        site: Site,
        buffers: Mapping[tuple[str, str], Node],
        shared: dict[tuple[str, Node], tuple[Node, Node | None]],
    ) -> None:
        packed = self._sites[site.name]
        group = self._groups[packed.group]
        source = linear.args[0]
        bias = linear.args[2] if len(linear.args) > 2 else None
        assert isinstance(source, Node)
        rotated, latent = shared.get((group.name, source), (source, None))
        made = rotated if latent is None else latent
        # A value that was written meanwhile, through a view of it, is another one.
        if (group.name, source) not in shared or (made is not source and written_between(source, made, linear)):
            rotated, latent = shared[group.name, source] = self._input_side(editor, linear, source, group, buffers)

        def own(key: str) -> Node | None:
            return buffers.get((site.name, key))

        call = editor.add_call(
            linear,
            f"packed_{linear.name}",
            torch.ops.lopro.packed_linear.default,
            (rotated, own("codes"), own("scales"), own("zeros"), bias, latent if own("up") else None, own("up"),
             own("up_scale"), packed.bits, packed.group_size),
            linear,
        )  # fmt: skip
        call.meta[META] = {"site": site.name, "group": group.name, "bits": packed.bits}
        # Its input and bias have readers; its weight may be a view that now has none.
        operands = linear.all_input_nodes
        editor.replace(linear, call)
        for operand in operands:
            editor.erase_unread(operand)

    def _input_side(
        self,
        editor: ProgramEditor,
        before: Node,
        source: Node,
        group: PackedGroup,
        buffers: Mapping[tuple[str, str], Node],
    ) -> tuple[Node, Node | None]:
        """Rotation and down-projection of one input, placed before its first reader; the latent is None at rank 0."""

        def add(name: str, target: Any, args: tuple[Any, ...]) -> Node:
            node = editor.add_call(before, name, target, args, before)
            # Several modules read the value, so it belongs to the innermost one around them all.
            if len(group.members) > 1 and "nn_module_stack" in node.meta:
                node.meta["nn_module_stack"] = enclosing(node.meta["nn_module_stack"], group.members)
            node.meta[META] = {"group": group.name}
            counters[f"rewrite.{name.partition('_')[0]}"] += 1
            return node

        def shared(key: str) -> Node | None:
            return buffers.get((group.name, key))

        rotated = source
        if group.rotates:
            args = (source, shared("perm"), shared("signs"), group.block, group.skip)
            rotated = add(f"rotate_{before.name}", torch.ops.lopro.rotate.default, args)
        down = shared("down")
        if down is None:
            return rotated, None
        args = (rotated, down, shared("down_scale"))
        return rotated, add(f"project_{before.name}", torch.ops.lopro.project.default, args)


def _look_up(
    editor: ProgramEditor, embedding: Node, packed: PackedSite, buffers: Mapping[tuple[str, str], Node]
) -> None:
    codes, scales, zeros = (buffers[packed.name, key] for key in ("codes", "scales", "zeros"))
    args = (embedding.args[1], codes, scales, zeros, packed.bits, packed.group_size, packed.in_features,
            embedding.meta["val"].dtype)  # fmt: skip
    operator = torch.ops.lopro.packed_embedding.default
    call = editor.add_call(embedding, f"packed_{embedding.name}", operator, args, embedding)
    call.meta[META] = {"site": packed.name, "group": packed.group, "bits": packed.bits}
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
