"""Find every Linear of an exported program.

A site is a parameter that multiplies activations in `aten.linear`; it is named by the fully qualified name (FQN) of the
module that owns the weight, so the same calibrated result fits every program of the same model. Of a weight that
several modules share, that is the module which computes the Linear. Sites whose Linear
nodes read the same tensor form a group: they share one Gram matrix, one rotation and one down-projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from lopro_fx.passes.mutation import written_between
from lopro_fx.passes.routers import find_routers
from lopro_fx.passes.ties import identity

_EMBEDDING = torch.ops.aten.embedding.default
_LINEAR = torch.ops.aten.linear.default
# Other products with a parameter: never rewritten, always listed.
_PRODUCTS = {
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.baddbmm.default: (1, 2),
    torch.ops.aten.matmul.default: (0, 1),
    torch.ops.aten.einsum.default: (1,),
    torch.ops.aten.conv1d.default: (1,),
    torch.ops.aten.conv2d.default: (1,),
    torch.ops.aten.conv3d.default: (1,),
}
# Kept by default: the output projection is a large share of a small model's quality and none of its decode layers.
OUTPUT_PATTERNS = ("lm_head", "*.lm_head", "embed_out", "*.embed_out", "output_projection")


@dataclass
class Site:
    """One Linear: FQN of its module, its weight's and bias's FQN, and every node that applies it.

    `embeddings` are the `aten.embedding` nodes whose table is the same tensor, `owners` all modules that have it as
    their `weight`.
    """

    name: str
    weight: str
    bias: str | None
    out_features: int
    in_features: int
    dtype: torch.dtype
    nodes: list[Node] = field(default_factory=list)
    embeddings: list[Node] = field(default_factory=list)
    owners: Sequence[str] = ()


@dataclass
class Group:
    """Sites that read the same value, in graph order; the first site's name is the group's."""

    sites: list[Site]

    @property
    def name(self) -> str:
        return self.sites[0].name

    @property
    def source(self) -> Node:
        """The node that every first use in the group reads."""
        source = self.sites[0].nodes[0].args[0]
        assert isinstance(source, Node)
        return source

    @property
    def in_features(self) -> int:
        return self.sites[0].in_features


@dataclass(frozen=True)
class Left:
    """A product with a parameter that stays as it is, with the reason."""

    name: str
    target: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Selection:
    """What `find_sites` decided: groups to rewrite, output projections to pack (each alone), and what is left."""

    groups: list[Group]
    left: list[Left]
    heads: list[Group] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        return [site for group in (*self.groups, *self.heads) for site in group.sites]


def parameter_fqns(program: ExportedProgram) -> dict[str, str]:
    """Placeholder name to FQN, for parameters, buffers and constants."""
    return {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target is not None
    }


def find_sites(
    program: ExportedProgram, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), heads: bool = False
) -> Selection:
    """List the Linears of `program` to rewrite and those to leave.

    Args:
        program: an exported program before decomposition (`aten.linear` nodes intact).
        include: name patterns (fnmatch, on the FQN of the module); a site must match one.
        exclude: name patterns that leave a site alone; they win over `include`.
        heads: list output projections that `include` doesn't name as `heads`, whatever else it says, instead of leaving
            them.

    Returns:
        A `Selection` in graph order.
    """
    fqns = parameter_fqns(program)
    embeddings, routers = _embeddings(program, fqns), find_routers(program)
    sites: dict[str, Site] = {}
    by_weight: dict[str, Site] = {}
    owners = _owners_of_weights(program)
    outputs: set[str] = set()
    left: list[Left] = []
    rejected: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or (node.target is not _LINEAR and node.target not in _PRODUCTS):
            continue
        weight_fqn = _parameter_of(node, fqns)
        if weight_fqn is None:
            if node.target is _LINEAR:
                left.append(
                    Left(node.name, str(node.target), (), "its weight is computed in the graph, not a parameter")
                )
            continue
        if weight_fqn in by_weight:
            by_weight[weight_fqn].nodes.append(node)
            continue
        if weight_fqn in rejected:
            continue
        tensor = _tensor(program, weight_fqn)
        modules = owners.get(identity(tensor), ())
        name = _name(node, weight_fqn, modules)
        named = _matches(name, include, "*")
        output = None if named else _reason_of_output(name, tensor, embeddings)
        reason = _reason_to_leave(node, tensor) or ("excluded by name" if _matches(name, exclude) else None)
        if reason is None and heads and output:
            reason = _reason_of_reader(program, fqns, tensor)
            outputs.add(name)
        elif reason is None and not _matches(name, include):
            reason = "not in the include patterns"
        elif reason is None and not named:
            reason = output or _reason_to_keep(node, tensor, routers)
        if reason:
            rejected.add(weight_fqn)
            left.append(Left(name, str(node.target), tuple(tensor.shape), reason))
            continue
        bias = node.args[2] if len(node.args) > 2 else None
        bias_fqn = fqns.get(bias.name) if isinstance(bias, Node) else None
        out_features, in_features = tensor.shape
        tables = [reader for reader, table in embeddings.items() if identity(table) == identity(tensor)]
        site = Site(name, weight_fqn, bias_fqn, out_features, in_features, tensor.dtype, [node], tables, modules)
        sites[name] = by_weight[weight_fqn] = site
    left += [
        Left(name, target, (), f"inside the nested graph of {parent}; only the top-level graph is rewritten")
        for parent, name, target in _nested_linears(program.graph_module)
    ]
    grouped = _grouped(site for name, site in sites.items() if name not in outputs)
    return Selection(grouped, left, [Group([site]) for name, site in sites.items() if name in outputs])


def _tensor(program: ExportedProgram, fqn: str) -> torch.Tensor:
    tensor = program.state_dict[fqn] if fqn in program.state_dict else program.constants[fqn]
    assert isinstance(tensor, torch.Tensor), fqn
    return tensor


def _owners_of_weights(program: ExportedProgram) -> dict[tuple[Any, ...], list[str]]:
    """FQN of every module that has a tensor as its `weight`, by the tensor's identity: several where it is tied."""
    owners: dict[tuple[Any, ...], list[str]] = {}
    for fqn, tensor in program.state_dict.items():
        if fqn.endswith(".weight"):
            owners.setdefault(identity(tensor), []).append(fqn.removesuffix(".weight"))
    return owners


def _name(node: Node, weight: str, owners: Sequence[str]) -> str:
    """FQN of the module that computes a Linear, if it is one of those that own the weight. The graph has one name for
    all of them, which is that of an embedding if the model made it last."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = stack[-1][0] if stack else ""
    return module if module in owners else weight.removesuffix(".weight")


def _parameter_of(node: Node, fqns: dict[str, str]) -> str | None:
    """FQN of the weight that `node` multiplies with, looking at the operands where a weight can stand."""
    for position in _PRODUCTS.get(node.target, (1,)):  # pyright: ignore[reportArgumentType, reportCallIssue]
        operand = node.args[position] if position < len(node.args) else None
        if isinstance(operand, Node) and operand.name in fqns:
            return fqns[operand.name]
    return None


def _matches(name: str, patterns: Sequence[str], but: str | None = None) -> bool:
    return any(pattern != but and fnmatchcase(name, pattern) for pattern in patterns)


def _reason_to_leave(node: Node, tensor: torch.Tensor) -> str | None:
    if node.target is not _LINEAR:
        return f"{node.target} is not aten.linear (Conv1D, experts and convolutions keep their weights)"
    if tensor.dim() != 2:
        return f"its weight has {tensor.dim()} dimensions"
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return f"its weight is {tensor.dtype}; fp32, bf16 and fp16 are quantised"
    return None


def _reason_to_keep(node: Node, tensor: torch.Tensor, routers: set[Node]) -> str | None:
    if node in routers:
        return "it chooses experts, kept by default (name it in include to take it)"
    if tensor.shape[0] == 1:
        return "a single output feature saves nothing, kept by default (name it in include to take it)"
    return None


def _reason_of_output(name: str, tensor: torch.Tensor, embeddings: dict[Node, torch.Tensor]) -> str | None:
    """Why a Linear is an output projection."""
    if any(_share_storage(table, tensor) for table in embeddings.values()):
        return "its weight is tied to an embedding"
    if _matches(name, OUTPUT_PATTERNS):
        return "output projection, kept by default (name it in include to take it, or set head_bits)"
    return None


def _reason_of_reader(program: ExportedProgram, fqns: dict[str, str], tensor: torch.Tensor) -> str | None:
    """Why an output projection can't be packed: something besides Linears and embeddings reads its weight."""
    for placeholder in program.graph.find_nodes(op="placeholder"):
        other = _tensor(program, fqns[placeholder.name]) if placeholder.name in fqns else None
        if other is None or not placeholder.users or not _share_storage(other, tensor):
            continue
        if identity(other) != identity(tensor):
            return f"its weight shares memory with '{fqns[placeholder.name]}', which is another part or view of it"
        for user in placeholder.users:
            at = [index for index, operand in enumerate(user.args) if operand is placeholder]
            if (user.target, at) not in ((_LINEAR, [1]), (_EMBEDDING, [0])):
                return f"its weight is also read by '{user.name}' ({user.target}), which needs it whole"
    return None


def _share_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _embeddings(program: ExportedProgram, fqns: dict[str, str]) -> dict[Node, torch.Tensor]:
    """Table of every embedding that reads a parameter."""
    nodes = program.graph.find_nodes(op="call_function", target=_EMBEDDING)
    return {node: _tensor(program, fqns[node.args[0].name]) for node in nodes
            if isinstance(node.args[0], Node) and node.args[0].name in fqns}  # fmt: skip


def _nested_linears(root: GraphModule) -> Iterator[tuple[str, str, str]]:
    for parent, module in root.named_modules():
        if parent and isinstance(module, GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=_LINEAR):
                yield parent, node.name, str(_LINEAR)


def _grouped(sites: Iterable[Site]) -> list[Group]:
    groups: dict[Node, Group] = {}
    found: list[Group] = []
    for site in sites:
        source = site.nodes[0].args[0]
        assert isinstance(source, Node)
        group = groups.get(source)
        if group is None or written_between(source, group.sites[-1].nodes[0], site.nodes[0]):
            groups[source] = group = Group([])
            found.append(group)
        group.sites.append(site)
    return found
