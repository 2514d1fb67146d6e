"""Products of few rows with a large matrix: their time is the matrix's as much as their FLOP's.

All of the matrix comes from memory, and libraries' kernels are made for many rows: 16 tokens by 600 MB run at a tenth
of the rate of 1,024 tokens. So these are measured as a *grid*: for a few numbers of rows, a curve of FLOP to seconds
over growing matrices.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ssdtune.schedule.curve import Curve

Grid = Mapping[int, Curve]  # rows -> FLOP -> seconds


def seconds_in(grid: Grid, plain: Curve, flop: float, num_rows: int) -> float | None:
    """How long so many rows by one matrix take; None for a matrix smaller than those measured, or an empty grid.

    Between two numbers of rows a straight line over the same matrix. Beyond the largest, what it takes and the rest of
    the FLOP at the rate of products of many rows. plain: FLOP -> seconds of those.
    """
    if num_rows < 1:
        return None
    of_row = flop / num_rows
    known = [rows for rows in sorted(grid) if rows * of_row >= grid[rows].points[0][0]]
    if len(known) < len(grid) or not known:
        return None
    measured = [grid[rows].seconds(rows * of_row) for rows in known]
    levelled = itertools.accumulate(measured, max)  # more rows never take less time
    times = dict(zip(known, levelled, strict=True))
    if num_rows <= known[0]:
        return times[known[0]]
    for low, high in itertools.pairwise(known):
        if num_rows <= high:
            share = (num_rows - low) / (high - low)
            return times[low] + share * (times[high] - times[low])
    most = known[-1]
    return times[most] + max(0.0, plain.seconds(flop) - plain.seconds(most * of_row))
