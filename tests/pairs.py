"""Parameters of tests: all pairs of choices in the fast suite, every combination in the slow one.

What goes wrong where two choices meet is found by the pairs; combinations of three are many, and slow by their number.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pairwise(*choices: Mapping[str, Any]) -> Iterator[Any]:
    """One value of each choice, under their names. Of three choices every pair at once; of two each value, by turns."""
    for picked in itertools.product(*(enumerate(each.items()) for each in choices)):
        is_at_once = sum(position for position, _ in picked) % 2 == 0
        names, values = zip(*(named for _, named in picked), strict=True)
        marks = [] if is_at_once else [pytest.mark.slow]
        yield pytest.param(*values, id="-".join(names), marks=marks)


def by_turns(names: Iterable[str]) -> Iterator[Any]:
    """(name, dtype): each name at once, in float32 and bfloat16 by turns; slow in the other one."""
    return pairwise({name: name for name in names}, DTYPES)
