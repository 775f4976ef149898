"""Find every Linear of an exported program, and every stack of experts.

A site is a parameter that multiplies activations in `aten.linear`, as it is or transposed. Its name is the fully
qualified name (FQN) of the module that owns the weight, so one calibrated result fits every program of a model. A
shared weight is named after the module that computes the first Linear. Sites whose Linear nodes read the same tensor
form a group: they share one Gram matrix, one rotation and one low-rank down factor.

The experts of a layer are one site too: a parameter (experts, out_features, in_features) of `lopro::routed_linear`,
named by its own FQN. They form a group with others that read the same tensor by the same ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lopro_fx.passes.experts import ROUTED
from lopro_fx.passes.mutation import written_between
from lopro_fx.passes.routers import find_routers
from lopro_fx.passes.ties import identity
from lopro_fx.passes.weights import FLOATS, Seen, Weights, tensor_of

aten = torch.ops.aten
_EMBEDDING = aten.embedding.default
_LINEAR = aten.linear.default
# Products that are quantised, with the position of the weight.
_TAKEN = {_LINEAR: (1,), ROUTED: (2,)}
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)
# Other products, with the positions of operands that can be weights; with a parameter they are reported as skipped.
_PRODUCTS = {
    aten.addmm: (1, 2),
    aten.mm: (0, 1),
    aten.mv: (0,),
    aten.bmm: (0, 1),
    aten.baddbmm: (1, 2),
    aten.addbmm: (1, 2),
    aten.matmul: (0, 1),
    aten.inner: (0, 1),
    aten.tensordot: (0, 1),
    aten.einsum: (1,),
    aten.bilinear: (2,),
    aten.conv1d: (1,),
    aten.conv2d: (1,),
    aten.conv3d: (1,),
}
# Kept by default: an output projection decides much of a small model's quality, and is no decoder layer.
OUTPUT_PATTERNS = ("lm_head", "*.lm_head", "embed_out", "*.embed_out", "output_projection")


@dataclass
class Site:
    """One Linear: FQN of its module, its weight's and bias's FQN, and every node that applies it.

    `embeddings` are the `aten.embedding` nodes whose table is the same tensor, `owners` the names of all modules that
    have it as their `weight`. With `transposed`, the weight is stored as (in_features, out_features). `experts` is the
    number of such matrices in the weight, 0 for a Linear.
    """

    name: str
    weight: str
    bias: str | None
    out_features: int
    in_features: int
    dtype: torch.dtype
    nodes: list[Node] = field(default_factory=list)
    embeddings: list[Node] = field(default_factory=list)
    transposed: bool = False
    owners: Sequence[str] = ()
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight: (out_features, in_features), after the number of experts."""
        return (*([self.experts] if self.experts else []), self.out_features, self.in_features)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass
class Group:
    """Sites that read the same value, in graph order; the first site's name is the group's."""

    sites: list[Site]

    @property
    def name(self) -> str:
        return self.sites[0].name

    @property
    def source(self) -> Node:
        """The shared input: the node that each site's first Linear reads."""
        source = self.sites[0].nodes[0].args[0]
        assert isinstance(source, Node)
        return source

    @property
    def in_features(self) -> int:
        return self.sites[0].in_features

    @property
    def experts(self) -> int:
        """Number of experts; 0 for Linears."""
        return self.sites[0].experts


@dataclass(frozen=True)
class Skipped:
    """A parameter that multiplies something and is not quantised, with the reason; `lost` if it looks like experts."""

    name: str
    target: str
    shape: tuple[int, ...]
    reason: str
    lost: bool = False


@dataclass(frozen=True)
class Selection:
    """Result of `find_sites`: groups to rewrite, output projections to pack (each alone), and skipped products."""

    groups: list[Group]
    skipped: list[Skipped]
    heads: list[Group] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        return [site for group in (*self.groups, *self.heads) for site in group.sites]


def find_sites(
    program: ExportedProgram,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    heads: bool = False,
    keep: bool = True,
) -> Selection:
    """List the Linears of `program` to rewrite and those to skip.

    Args:
        program: an exported program before decomposition (`aten.linear` nodes intact), after `as_linears`.
        include: name patterns (fnmatch, on the FQN of the module); a site must match one.
        exclude: name patterns of sites to skip; they win over `include`.
        heads: list output projections as `heads` instead of skipping them, unless `include` names them exactly.
        keep: skip output projections, routers and Linears of one output feature, unless `include` names them exactly.

    Returns:
        A `Selection` in graph order.
    """
    weights = Weights.of(program)
    embeddings, routers = _embeddings(program, weights.fqns), find_routers(program)
    names = _names(program)
    # By the weight's FQN: Linears that share a weight are one site, named after the first.
    sites: dict[str, Site] = {}
    outputs: set[str] = set()
    skipped: list[Skipped] = []
    rejected: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or (node.target not in _TAKEN and _packet(node) not in _PRODUCTS):
            continue
        found = _weight_of(node, weights)
        if found is None:
            if node.target is _LINEAR:
                skipped.append(
                    Skipped(node.name, str(node.target), (), "its weight is computed in the graph, not a parameter")
                )
            continue
        fqn = weights.fqn(found)
        if fqn in rejected:
            continue
        tensor = tensor_of(program, fqn)
        tied = names.get(identity(tensor), ())
        name = sites[fqn].name if fqn in sites else _name(node, fqn, tied)
        experts = node.target is ROUTED
        whole, transposed = (found.whole_stack, found.transposed_stack) if experts else (found.whole, found.transposed)
        transposed = transposed and not whole
        if fqn in sites:
            same = transposed == sites[fqn].transposed and experts == bool(sites[fqn].experts)
            if node.target in _TAKEN and (whole or transposed) and same:
                sites[fqn].nodes.append(node)
                continue
            # Packed rows serve one form only; keeping the weight for the other would save nothing.
            del sites[fqn]
            outputs.discard(fqn)
            reason = f"its weight is also read in another form, by '{node.name}' ({node.target})"
        else:
            reason = _reason_to_leave(node, found, tensor) or ("excluded by name" if _matches(name, exclude) else None)
        named = not keep or name in include
        output = None if named else _reason_of_output(name, tensor, embeddings)
        if reason is None and heads and output:
            reason = _reason_of_reader(program, weights, tensor)
            outputs.add(fqn)
        elif reason is None and not _matches(name, include):
            reason = "not in the include patterns"
        elif reason is None and not named:
            reason = output or _reason_to_keep(node, routers)
        if reason:
            rejected.add(fqn)
            lost = tensor.dim() > 2 and node.target not in _TAKEN and _packet(node) not in _CONVOLUTIONS
            skipped.append(Skipped(name, str(node.target), tuple(tensor.shape), reason, lost))
            continue
        matrix = tensor.mT if transposed else tensor
        bias = node.args[2] if len(node.args) > 2 and not experts else None
        bias_fqn = weights.fqns.get(bias.name) if isinstance(bias, Node) else None
        tables = [reader for reader, table in embeddings.items() if identity(table) == identity(matrix)]
        owners = [other.removesuffix(".weight") for other in tied]
        count, (rows, width) = matrix.shape[0] if experts else 0, matrix.shape[-2:]
        sites[fqn] = Site(name, fqn, bias_fqn, rows, width, tensor.dtype, [node], tables, transposed, owners, count)
    skipped += [
        Skipped(name, target, (), f"inside the nested graph of {parent}; only the top-level graph is rewritten")
        for parent, name, target in _nested_linears(program.graph_module, weights)
    ]
    skipped += _unknown_stacks(program, weights, {*sites, *rejected})
    grouped = _grouped(site for fqn, site in sites.items() if fqn not in outputs)
    return Selection(grouped, skipped, [Group([site]) for fqn, site in sites.items() if fqn in outputs])


def weight_of(program: ExportedProgram, site: Site) -> torch.Tensor:
    """The site's original weight, of its shape."""
    tensor = tensor_of(program, site.weight).detach()
    return tensor.mT.contiguous() if site.transposed else tensor


def _unknown_stacks(program: ExportedProgram, weights: Weights, known: Set[str]) -> list[Skipped]:
    """Parameters that hold several matrices and are read in a form that isn't known: they may be experts."""
    found = []
    for placeholder in program.graph.find_nodes(op="placeholder"):
        seen = weights.seen(placeholder)
        if seen is None or not placeholder.users or not weights.is_parameter(seen) or weights.fqn(seen) in known:
            continue
        name, tensor = weights.fqn(seen), tensor_of(program, weights.fqn(seen))
        if tensor.dim() < 3 or tensor.dtype not in FLOATS or min(tensor.shape) < 2:
            continue
        reader = next(iter(placeholder.users))
        if _packet(reader) in _CONVOLUTIONS:
            continue
        size = tensor.numel() * tensor.element_size() / 1e6
        reason = f"{size:.1f} MB in {tensor.dim()} dimensions, read by '{reader.name}' ({reader.target}): no known form"
        found.append(Skipped(name, str(reader.target), tuple(tensor.shape), f"{reason} of experts", True))
    return found


def _names(program: ExportedProgram) -> dict[Any, list[str]]:
    """FQNs of each tensor of the state dict, by its identity."""
    names: dict[Any, list[str]] = {}
    for fqn, tensor in program.state_dict.items():
        names.setdefault(identity(tensor), []).append(fqn)
    return names


def _name(node: Node, fqn: str, tied: Sequence[str]) -> str:
    """Name of the Linear that `node` computes.

    Exporters choose the first or the last name of a tied weight; the module that applies it is the same in every
    program.
    """
    paths = [path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())] if len(tied) > 1 else []
    return next((path for path in paths if f"{path}.weight" in tied), fqn.removesuffix(".weight"))


def _packet(node: Node) -> Any:
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else None


def _weight_of(node: Node, weights: Weights) -> Seen | None:
    """Find the weight among those operands of `node` that can be one.

    For operators other than `aten.linear`, a buffer or constant counts only if it is read directly: models multiply by
    views of frequency tables, masks and the like.
    """
    places = _TAKEN[node.target] if node.target in _TAKEN else _PRODUCTS[_packet(node)]  # pyright: ignore[reportArgumentType]
    for place in places:
        operand = node.args[place] if place < len(node.args) else None
        for candidate in operand if isinstance(operand, (list, tuple)) else (operand,):
            found = weights.seen(candidate) if isinstance(candidate, Node) else None
            if found and (node.target in _TAKEN or weights.is_parameter(found) or candidate is found.placeholder):
                return found
    return None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(pattern == name or fnmatchcase(name, pattern) for pattern in patterns)


def _reason_to_leave(node: Node, found: Seen, tensor: torch.Tensor) -> str | None:
    if node.target is ROUTED:
        taken = tensor.dtype in FLOATS and (found.whole_stack or found.transposed_stack)
        return None if taken else "its weight is a part of the parameter, or no fp32, bf16 or fp16"
    if tensor.dim() == 2 and not found.whole and not found.transposed:
        return "its weight is a part or another view of the parameter, which only whole or transposed is taken"
    if node.target is not _LINEAR:
        return f"{node.target} is not aten.linear, and no known form of experts"
    if tensor.dim() != 2:
        return f"its weight has {tensor.dim()} dimensions"
    if tensor.dtype not in FLOATS:
        return f"its weight is {tensor.dtype}; fp32, bf16 and fp16 are quantised"
    return None


def _reason_to_keep(node: Node, routers: set[Node]) -> str | None:
    if node in routers:
        return "it chooses experts, kept by default (name it in include to take it)"
    if node.meta["val"].shape[-1] == 1:
        return "a single output feature saves nothing, kept by default (name it in include to take it)"
    return None


def _reason_of_output(name: str, tensor: torch.Tensor, embeddings: dict[Node, torch.Tensor]) -> str | None:
    """Reason to treat a Linear as an output projection; None if it is none."""
    if any(_share_storage(table, tensor) for table in embeddings.values()):
        return "its weight is tied to an embedding"
    if _matches(name, OUTPUT_PATTERNS):
        return "output projection, kept by default (name it in include to take it, or set head_bits)"
    return None


def _reason_of_reader(program: ExportedProgram, weights: Weights, tensor: torch.Tensor) -> str | None:
    """Reason why an output projection can't be packed: other nodes than Linears and embeddings read its weight."""
    for placeholder in program.graph.find_nodes(op="placeholder"):
        other = tensor_of(program, weights.fqns[placeholder.name]) if placeholder.name in weights.fqns else None
        if other is None or not placeholder.users or not _share_storage(other, tensor):
            continue
        if identity(other) != identity(tensor):
            return (
                f"its weight shares memory with '{weights.fqns[placeholder.name]}', which is another part or view of it"
            )
        if reader := _other_reader(placeholder, weights):
            return f"its weight is also read by '{reader.name}' ({reader.target}), which needs it whole"
    return None


def _other_reader(weight: Node, weights: Weights) -> Node | None:
    """First reader of a weight, or of a view of it, that is neither a Linear nor an embedding."""
    for user in weight.users:
        at = [index for index, operand in enumerate(user.args) if operand is weight]
        if (user.target, at) in ((_LINEAR, [1]), (_EMBEDDING, [0])):
            continue
        if weights.seen(user) is None:
            return user
        if reader := _other_reader(user, weights):
            return reader
    return None


def _share_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _embeddings(program: ExportedProgram, fqns: Mapping[str, str]) -> dict[Node, torch.Tensor]:
    """Table of every embedding that reads a parameter."""
    nodes = program.graph.find_nodes(op="call_function", target=_EMBEDDING)
    return {node: tensor_of(program, fqns[node.args[0].name]) for node in nodes
            if isinstance(node.args[0], Node) and node.args[0].name in fqns}  # fmt: skip


def _nested_linears(root: GraphModule, weights: Weights) -> Iterator[tuple[str, str, str]]:
    """(nested graph, weight or node, operator) of every Linear that isn't in the top-level graph."""
    for call in root.graph.nodes:
        nodes = [operand for operand in pytree.tree_leaves(call.args) if isinstance(operand, Node)]
        bodies = [node for node in nodes if node.op == "get_attr" and isinstance(_attribute(root, node), GraphModule)]
        # A call's operands follow the graphs that take them.
        operands = nodes[nodes.index(bodies[-1]) + 1 :] if bodies else []
        for body in bodies:
            nested = _attribute(root, body)
            inner = weights.inside(nested.graph, operands)
            for node in nested.graph.nodes:
                if node.target is _LINEAR or _packet(node) in _PRODUCTS:
                    found = _weight_of(node, inner)
                    if found or node.target is _LINEAR:
                        name = inner.fqn(found).removesuffix(".weight") if found else node.name
                        yield str(body.target), name, str(node.target)
            yield from _nested_linears(nested, inner)


def _attribute(root: GraphModule, node: Node) -> Any:
    value: Any = root
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def _grouped(sites: Iterable[Site]) -> list[Group]:
    groups: dict[tuple[Any, ...], Group] = {}
    found: list[Group] = []
    for site in sites:
        source, *others = site.nodes[0].args
        assert isinstance(source, Node)
        # Experts: those of the same ids.
        key = (source, others[0], site.experts, others[2]) if site.experts else (source,)
        group = groups.get(key)
        if group is None or written_between(source, group.sites[-1].nodes[0], site.nodes[0]):
            groups[key] = group = Group([])
            found.append(group)
        group.sites.append(site)
    return found
