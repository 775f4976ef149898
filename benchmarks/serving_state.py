"""A quantised state made in a minute, for timings: all that LoPRo stores, without its search for accuracy.

Random signs and Hadamard blocks, a rank-16 branch from the weights' own singular vectors, none for experts, the rest
rounded to nearest, the output projection in 8 bits: shapes, types and operators are those of a calibrated state, so the
time is too. The codes of the format "trellis" are drawn at random, since every string of bits is one of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx import RTN, LoPRo, QuantState
from lopro_fx.kernels.formats.packed import Packed
from lopro_fx.kernels.formats.quantizer import Rounded
from lopro_fx.kernels.formats.trellis.code import code_words
from lopro_fx.kernels.formats.trellis.quantizer import TrellisQuantizer
from lopro_fx.layer import Transform
from lopro_fx.methods.base import Solved, Unit
from lopro_fx.methods.experts import stacked
from lopro_fx.methods.lowrank import gram_components, round_factor
from lopro_fx.methods.rotation import largest_block, random_signs
from lopro_fx.methods.rounding import pack_solution
from lopro_fx.methods.rtn import solve_data_free
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.passes.linears import as_linears
from lopro_fx.passes.sites import Group, weight_of
from lopro_fx.selection import select


def rounded_state(program: ExportedProgram, config: LoPRo) -> QuantState:
    """`config` gives widths, group size, rank and block size."""
    program = as_linears(program)
    selection = select(program, config)
    generator = torch.Generator().manual_seed(config.seed)
    inputs, layers = {}, {}

    def unit_of(group: Group, weights: list[Tensor]) -> Unit:
        return Unit(group.name, tuple(site.name for site in group.sites), weights)

    def add(solved: Solved, embedding: bool) -> None:
        inputs[solved.input.name] = solved.input
        layers.update((layer.name, replace(layer, embedding=embedding)) for layer in solved.layers)

    for group in selection.groups:
        unit = unit_of(group, [weight_of(program, site).to(torch.float32) for site in group.sites])
        width = group.in_features
        transform = Transform(signs=random_signs(width, generator), block=largest_block(width, config.block_size))

        def solved(part: Unit, rank: int, transform: Transform = transform) -> Solved:
            return pack_solution(part, _solve(part.weights, replace(config, rank=rank), transform, generator))

        if unit.experts:
            add(stacked(unit, [solved(unit.expert(index), 0) for index in range(unit.experts)]), False)
        else:
            add(solved(unit, config.rank), False)
    for head in selection.heads:
        weight = weight_of(program, head.sites[0])
        rtn = RTN(bits=config.head_bits, group_size=config.group_size, clip_steps=0)
        add(pack_solution(unit_of(head, [weight]), solve_data_free(weight, rtn.quantizer)), True)
    return QuantState(config.to_dict(), inputs, layers, [(item.name, item.reason) for item in selection.skipped])


def _solve(weights: Sequence[Tensor], config: LoPRo, transform: Transform, generator: torch.Generator) -> GroupSolution:
    rest, rows = transform.forward(torch.cat(list(weights))), [weight.shape[0] for weight in weights]
    width, down, ups = rest.shape[1], None, ()
    if config.rank:
        directions = gram_components(rest, None, config.rank, generator, iterations=0)
        down = round_factor(directions, config.factor_bits, 0)
        ups = tuple(round_factor(part, config.factor_bits, 1) for part in (rest @ directions.T).split(rows))
        rest = rest - torch.cat([up.dense() for up in ups]) @ down.dense()
    quantizer = config.quantizer
    if isinstance(quantizer, TrellisQuantizer):
        rounded: Rounded = _RandomCodes(rest.square().mean(1).sqrt(), width, quantizer, generator)
    else:
        rounded = replace(config, clip_steps=0).quantizer.nearest(rest, rows)
    return GroupSolution(transform, rounded, down, ups, 0.0, 0.0, 0.0, "full")


@dataclass(frozen=True)
class _RandomCodes(Rounded):
    """Random weights (m, width) in the format "trellis", with `scales` fp32 (m,)."""

    scales: Tensor
    width: int
    quantizer: TrellisQuantizer
    generator: torch.Generator

    def split(self, rows: Sequence[int]) -> list[_RandomCodes]:
        return [replace(self, scales=scales) for scales in self.scales.split(list(rows))]

    def packed(self) -> Packed:
        own, shape = self.quantizer, (len(self.scales), self.width)
        count = code_words(shape, round(own.bits * own.columns), own.columns, own.strip)
        codes = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, generator=self.generator)
        spec = {"bits": float(own.bits), "columns": own.columns, "window": own.window, "strip": own.strip}
        return Packed("trellis", shape, spec, {"scales": self.scales.to(torch.float16), "codes": codes})
