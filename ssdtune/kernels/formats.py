"""Packed formats: how a few bytes in a file stand for a tensor's values.

A format is a frozen value that knows which parts make up a tensor of some shape, and decodes them. `by_torch` is the
definition, with torch's operators; `unpack.py` chooses what is fastest and has the same bits.

A tensor's elements are numbered in row-major order, whatever its shape; groups and blocks are runs of them. Arithmetic
is in float32, each operation rounded once; the last rounding, to nearest, is to the dtype of the output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One of the file tensors that make up a packed tensor. suffix: of its name; dtype: as safetensors names it."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


@runtime_checkable
class Format(Protocol):
    """A packed format. Implementations are frozen dataclasses: hashable, compared by value."""

    @property
    def label(self) -> str:
        """For messages and tables: "affine, 4 bits, groups of 64"."""
        ...

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """What the file must hold for a tensor of this shape, in the order that decoding takes."""
        ...

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Decodes. parts: as `parts` says, on the device of `out`. out: of the tensor's shape, contiguous, float32,
        bfloat16 or float16."""
        ...


def num_elements(shape: Sequence[int]) -> int:
    """Of a tensor of this shape."""
    return math.prod(shape)
