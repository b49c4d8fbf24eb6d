"""The codes of a row whose values come closest to given ones: Viterbi's search through the trellis of
``kernels.window``.

The least cost of ending in each state is carried along a row; it is exact, for all paths into a state but the best are
no better later on either. Rows are independent, and some are searched side by side, as many as leave the costs of a
step in the cache. Only costs are kept of the steps: which way was the best is found again from them on the way back.

Rows are decided a piece of columns at a time, each with some columns ahead of it in view, since what is decided binds
what comes after. A caller that rounds with error feedback changes later columns between pieces; for others the pieces
only bound the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Costs of a step that are worked on at a time, on a CPU and elsewhere; all steps' take up to 160 times as much memory.
_COSTS, _MANY_COSTS = 1 << 16, 1 << 20
# Columns that are decided at a time, and more in view: the squared error is 0.1 % above that of whole rows.
_PIECE, _VIEW = 128, 32


def nearest_paths(values: Tensor, table: Tensor, bits: int) -> Tensor:
    """uint8 codes (rows, width) whose looked up values are the nearest to float32 ``values`` (rows, width).

    Args:
        table: float32 (2^memory,), by number.
        bits: of a code, at most ``memory``.
    """
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    columns = values.T.contiguous()
    state, memory = None, _memory(columns[: _PIECE + _VIEW], table)
    for begin in range(0, len(columns), _PIECE):
        path = best_path(columns[begin : begin + _PIECE + _VIEW], table, bits, state, memory)[:_PIECE]
        codes[:, begin : begin + _PIECE] = codes_of(path, table, bits).T
        state = path[-1]
    return codes


def codes_of(states: Tensor, table: Tensor, bits: int) -> Tensor:
    """The uint8 codes that led into ``states``: their topmost bits."""
    return (states >> table.numel().bit_length() - 1 - bits).to(torch.uint8)


def _memory(columns: Tensor, table: Tensor) -> Tensor:
    """For the costs (columns, states, rows) of as many rows as are searched side by side."""
    most = max(1, (_COSTS if columns.device.type == "cpu" else _MANY_COSTS) // table.numel())
    return columns.new_empty(len(columns), table.numel(), min(most, columns.shape[1]))


def best_path(
    columns: Tensor, table: Tensor, bits: int, start: Tensor | None = None, memory: Tensor | None = None
) -> Tensor:
    """The states, int64 (columns, rows), on the path whose values are nearest to float32 ``columns`` (columns, rows).

    Args:
        start: (rows,) states that the paths set out from; None is that of zeros, before a row's first code.
        memory: for the costs of as many columns or more, which is slow to come by; None makes some.
    """
    rows = columns.shape[1]
    found = torch.empty(columns.shape, dtype=torch.int64, device=columns.device)
    start = torch.zeros(rows, dtype=torch.int64, device=columns.device) if start is None else start
    memory = _memory(columns, table) if memory is None else memory
    step = max(1, memory.shape[2])
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        costs = memory[: len(columns), :, : part.stop - begin]
        _carry(columns[:, part], table, bits, start[part], costs)
        found[:, part] = _back(costs, bits)
    return found


def _carry(columns: Tensor, table: Tensor, bits: int, start: Tensor, costs: Tensor) -> None:
    """Fill ``costs`` (columns, states, rows): the least sum of (c - v)^2 - v^2 over paths that end in each state."""
    fan, rows = 2**bits, columns.shape[1]
    shared = table.numel() // fan  # the part of a number that its two codes have in common
    squares, doubled = table.square()[:, None], -2 * table[:, None]
    # From one state only those are reached that share its upper bits.
    least = torch.full((shared, rows), torch.inf, device=columns.device)
    least[start >> bits, torch.arange(rows, device=columns.device)] = 0
    for values, cost in zip(columns, costs, strict=True):
        torch.addcmul(squares, doubled, values[None], out=cost)
        cost.view(fan, shared, rows).add_(least)
        least = cost.view(shared, fan, rows).amin(1)


def _back(costs: Tensor, bits: int) -> Tensor:
    """The states of the paths of least cost, from their last."""
    steps, states, rows = costs.shape
    fan = 2**bits
    shared, row = states // fan, torch.arange(rows, device=costs.device)
    path = torch.empty(steps, rows, dtype=torch.int64, device=costs.device)
    path[-1] = costs[-1].argmin(0)
    for step in range(steps - 1, 0, -1):
        first = path[step] % shared
        before = costs[step - 1].view(shared, fan, rows)[first, :, row]
        path[step - 1] = first * fan + before.argmin(1)
    return path
