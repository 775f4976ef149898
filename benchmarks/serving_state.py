"""A quantised state made in a minute, for timings: all that LoPRo stores, without its search for accuracy.

Random signs and Hadamard blocks, a rank-16 branch from the weights' own singular vectors, the rest rounded to nearest,
the output projection in 8 bits: shapes, types and operators are those of a calibrated state, so the time is too.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx import LoPRo, QuantState
from lopro_fx.methods.lowrank import randomized_svd, round_factor
from lopro_fx.methods.rotation import Transform, largest_block, random_signs
from lopro_fx.methods.rtn import round_to_nearest, solve_data_free
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.packing import pack_solution
from lopro_fx.passes.linears import as_linears
from lopro_fx.passes.sites import weight_of
from lopro_fx.quantize import select


def rounded_state(program: ExportedProgram, config: LoPRo) -> QuantState:
    """`config` gives widths, group size, rank and block size."""
    program = as_linears(program)
    selection = select(program, config)
    generator = torch.Generator().manual_seed(config.seed)
    groups, sites = {}, {}
    for group in selection.groups:
        weights = [weight_of(program, site).to(torch.float32) for site in group.sites]
        packed, members = pack_solution(group, _solve(weights, config, generator), "rtn", config.bits)
        groups[packed.name] = packed
        sites |= {site.name: site for site in members}
    for head in selection.heads:
        solution = solve_data_free(weight_of(program, head.sites[0]), config.head_bits, config.group_size, 0)
        packed, members = pack_solution(head, solution, "rtn", config.head_bits)
        groups[packed.name] = packed
        sites |= {site.name: replace(site, embedding=True) for site in members}
    return QuantState(config.to_dict(), groups, sites, [(item.name, item.reason) for item in selection.left])


def _solve(weights: list[Tensor], config: LoPRo, generator: torch.Generator) -> GroupSolution:
    joint = torch.cat(weights)
    width = joint.shape[1]
    transform = Transform(signs=random_signs(width, generator), block=largest_block(width, config.block_size))
    rotated = transform.forward(joint)
    _, _, directions = randomized_svd(rotated, config.rank, generator, iterations=0)
    down = round_factor(directions, config.factor_bits, 0)
    rows = [weight.shape[0] for weight in weights]
    ups = tuple(round_factor(part, config.factor_bits, 1) for part in (rotated @ directions.T).split(rows))
    rest = rotated - torch.cat([up.dense() for up in ups]) @ down.dense()
    rounded = round_to_nearest(rest, config.bits, config.group_size, 0)
    return GroupSolution(transform, rounded, down, ups, 0.0, 0.0, 0.0, "full")
