"""Affine codes of rotated groups: what is stored stands for a group's Hadamard rotation, which spreads outliers.

    w = H_n v / sqrt(n)        v = (q - z) s, as affine.py has it; n: elements of a group
    H_1 = (1), H_2n = ((H_n, H_n), (H_n, -H_n))

H_n / sqrt(n) is orthogonal and its own inverse: encoding rotates alike, and the squared error of w is that of v. Only
weights are rotated, and back again when they are decoded; the model computes as ever.

Sums are float32, each rounded, in the order of the fast Walsh-Hadamard transform: (a, b) becomes (a + b, a - b), first
of neighbours, then of elements 2, 4, ... n / 2 apart. Then one product with the float32 nearest to 1 / sqrt(n), rounded
to float32, then to the output. A last group that is not whole is not rotated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ssdtune.kernels.affine import Affine
from ssdtune.kernels.formats import Part


@dataclasses.dataclass(frozen=True, slots=True)
class Rotated:
    """stored: what the codes are; its groups are rotated."""

    stored: Affine

    @property
    def label(self) -> str:
        """For messages and tables."""
        return f"{self.stored.label}, rotated"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """As the stored format."""
        return self.stored.parts(shape)

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        flat = out.view(-1)
        for some, values in self.stored.values(parts, flat.numel()):
            flat[some] = rotated(values, self.stored.group)


def rotated(values: torch.Tensor, group: int) -> torch.Tensor:
    """Each whole group rotated; its own inverse but for rounding. values: float32, flat. group: a power of two."""
    whole = values.numel() // group * group
    groups = values[:whole]
    half = 1
    while half < group:
        first, second = groups.view(-1, 2, half).unbind(1)
        groups = torch.stack((first + second, first - second), dim=1)
        half *= 2
    return torch.cat((groups.reshape(-1) * group**-0.5, values[whole:]))
