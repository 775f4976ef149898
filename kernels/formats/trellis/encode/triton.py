"""The search for a GPU: a program takes one strip through a block of columns.

The costs of all 2^WINDOW states are one tensor in registers. A step takes the least of 2^STEP of them for each prefix,
and keeps which one that is, a byte, to walk back from the cheapest last state.
"""

from __future__ import annotations

import triton
import triton.language as tl

# As numbers of the kernels: constants of another module are no compile-time values.
_MULTIPLIER = tl.constexpr(0x83DCD12D - (1 << 32))
_UNIT = tl.constexpr(1 / 128)
_FAR = tl.constexpr(1e30)


@triton.jit
def _values(states, PAIR: tl.constexpr):
    """Values of the first and the second column of states, see `code.py`."""
    p = states * _MULTIPLIER
    b0, b1, b2, b3 = p & 255, (p >> 8) & 255, (p >> 16) & 255, (p >> 24) & 255
    if PAIR == 1:
        first = (b0 + b1 + b2 + b3 - 510).to(tl.float32) * _UNIT
        second = first
    else:
        first, second = (b0 + b3 - 255).to(tl.float32) * _UNIT, (b1 + b2 - 255).to(tl.float32) * _UNIT
    return first, second


@triton.jit
def encode_kernel(
    columns_ptr, target_ptr,  # (WIDTH, M) fp32; the target is changed
    upper_ptr,  # (WIDTH, WIDTH) fp32
    pivots_ptr,  # (WIDTH,) fp32
    importance_ptr,  # (M,) fp32
    firsts_ptr, counts_ptr,  # (strips,) int32: first row and number of rows
    back_ptr,  # (strips, most rows of a strip, 2^(WINDOW - STEP)) uint8, scratch
    error_ptr,  # (WIDTH, M) fp32
    states_ptr,  # (WIDTH / PAIR, M) int32
    M, MOST,
    WIDTH: tl.constexpr, STEP: tl.constexpr, PAIR: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: one strip."""
    PREFIXES: tl.constexpr = 1 << (WINDOW - STEP)
    SIZE: tl.constexpr = 1 << WINDOW
    strip = tl.program_id(0)
    first_row, count = tl.load(firsts_ptr + strip), tl.load(counts_ptr + strip)
    back_ptr += strip.to(tl.int64) * MOST * PREFIXES
    prefixes, states = tl.arange(0, PREFIXES), tl.arange(0, SIZE)
    value, value2 = _values(states, PAIR)
    for j in range(0, WIDTH, PAIR):
        carry, ratio = 0.0, 0.0
        if PAIR == 2:
            carry = tl.load(upper_ptr + j * WIDTH + j + 1)
            ratio = tl.load(pivots_ptr + j + 1) / tl.load(pivots_ptr + j)
        cost = tl.where(states == 0, 0.0, _FAR)
        for i in range(count):
            row = count - 1 - i
            at = j * M + first_row + row
            x, weight = tl.load(target_ptr + at), tl.load(importance_ptr + first_row + row)
            least, winner = tl.min(tl.reshape(cost, (1 << STEP, PREFIXES)), 0, return_indices=True)
            tl.store(back_ptr + row * PREFIXES + prefixes, winner.to(tl.uint8))
            error = x - value
            squared = error * error
            if PAIR == 2:
                # The target of the second column, but for its part in the first one's rounding error.
                second = tl.load(target_ptr + at + M) + carry * (tl.load(columns_ptr + at) - x)
                second = second + carry * error - value2
                squared += ratio * second * second
            spread = tl.broadcast_to(least[:, None], (PREFIXES, 1 << STEP))
            cost = tl.reshape(spread, (SIZE,)) + weight * squared
        state = tl.argmin(cost, 0).to(tl.int32)
        tl.debug_barrier()
        for row in range(count):
            tl.store(states_ptr + (j // PAIR) * M + first_row + row, state)
            prefix = state >> STEP
            state = (tl.load(back_ptr + row * PREFIXES + prefix).to(tl.int32) << (WINDOW - STEP)) | prefix
        tl.debug_barrier()
        for start in range(0, count, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            inside, rows = rows < count, rows + first_row
            found = tl.load(states_ptr + (j // PAIR) * M + rows, inside, 0)
            v, v2 = _values(found, PAIR)
            error = tl.load(columns_ptr + j * M + rows, inside, 0.0) - v
            tl.store(error_ptr + j * M + rows, error, inside)
            error2 = error
            if PAIR == 2:
                error2 = tl.load(columns_ptr + (j + 1) * M + rows, inside, 0.0) - v2
                tl.store(error_ptr + (j + 1) * M + rows, error2, inside)
            for k in range(j + PAIR, WIDTH):
                change = tl.load(upper_ptr + j * WIDTH + k) * error
                if PAIR == 2:
                    change += tl.load(upper_ptr + (j + 1) * WIDTH + k) * error2
                old = tl.load(target_ptr + k * M + rows, inside, 0.0)
                tl.store(target_ptr + k * M + rows, old + change, inside)
        tl.debug_barrier()
