"""Products with one matrix after another, all over a large memory: as in a model, none is still in a cache.

They are slower than with a matrix that is, and not by the same on all days: where neighbours on a host take a fifth of
their pace, products with a matrix that a core's own cache holds lose 7 %.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ssdtune.probe.timing import Run

Product = Callable[[Any, Any], Any]


def by_next(
    function: Product, values: torch.Tensor, memory: torch.Tensor, shape: tuple[int, int]
) -> Run:
    """Multiplies by another matrix of this shape each time. memory: values of at least one, in one dimension."""
    size = math.prod(shape)
    matrices = [part.view(shape) for part in memory.split(size) if part.numel() == size]
    following = itertools.cycle(matrices)
    return lambda: function(values, next(following))
