"""How `quantization` says that blocks of one bit-nested file are read in widths of their own.

    4.5/8          4.5 bits a weight on average, of a file of 8; which block is read in how many is chosen
    5,28x4,6/8     5 bits of the first block, 4 of the next 28, 6 of the last

Blocks are those that hold nested weights, in the model's order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from ssdtune.keys.model import BITS_BY_BLOCK


def is_by_block(quantization: str) -> bool:
    """Whether the value gives blocks widths of their own, listed or on average."""
    return re.fullmatch(BITS_BY_BLOCK, quantization) is not None


def mean_of(quantization: str) -> float | None:
    """The average that is asked for; None where widths are listed, or it is a value of another kind."""
    if "." not in quantization or not is_by_block(quantization):
        return None
    return float(quantization.removesuffix("/8"))


def widths_of(quantization: str) -> tuple[int, ...]:
    """The widths of "5,28x4,6/8"; a value that `is_by_block` and is no average."""
    widths: list[int] = []
    for run in quantization.removesuffix("/8").split(","):
        *count, bits = run.split("x")
        widths += [int(bits)] * (int(count[0]) if count else 1)
    return tuple(widths)


def written(widths: Sequence[int]) -> str:
    """What `widths_of` reads back: "5,28x4,6/8"; "30x4/8" where all are the same."""
    runs = [(bits, len(list(same))) for bits, same in itertools.groupby(widths)]
    is_one = len(runs) == 1
    told = (f"{count}x{bits}" if count > 1 or is_one else str(bits) for bits, count in runs)
    return f"{','.join(told)}/8"
