"""What a step does to the weights, as a few numbers: the rest is made again from the seed.

    theta_{t+1} = round(theta_t * decay + sum_j (-coefficient_j) z_j)    z_j from (seed, t, j, parameter's name)

in float32, from left to right (`kernels/noise.py`), rounded once. bfloat16 weights are rounded at random: an update is
far smaller than the distance between two of them, and rounding to nearest would lose it. A direction whose coefficient
is 0 is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ssdtune.kernels.noise import Direction, add_directions, add_low_rank, values
from ssdtune.kernels.philox import key_of, number_of

WINDOW = " of the window"  # makes another number of a parameter's name, for V


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """One step. step: its number, which its directions hang on. coefficients: learning rate times g_j, for each
    direction. decay: what parameters of two and more dimensions are multiplied by, 1 - lr x weight decay."""

    step: int
    coefficients: tuple[float, ...]
    decay: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """What random directions look like.

    kind: of their numbers, as in `kernels.noise`. rank: 0 for a number of its own for each element; else parameters of
    two and more dimensions, as matrices [first dimension, all others], move along U V^T with so many columns. window:
    for how many steps V stays the same.
    """

    kind: str
    rank: int = 0
    window: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Directions:
    """All random directions of a run."""

    seed: int
    family: Family

    def shift(
        self, to: torch.Tensor, base: torch.Tensor, name: str, *, step: int, j: int, scale: float
    ) -> None:
        """to = round(base + scale z_j), to nearest."""
        self._add(to, base, name, Update(step, (0.0,) * j + (-scale,)), rounding_key=None)

    def apply(self, parameter: torch.Tensor, name: str, updates: Sequence[Update]) -> None:
        """Takes these steps with a parameter, in place, each rounded by itself."""
        for update in updates:
            key = key_of(self.seed, update.step, number_of(name))
            self._add(parameter, parameter, name, update, rounding_key=key)

    def _add(
        self,
        to: torch.Tensor,
        base: torch.Tensor,
        name: str,
        update: Update,
        *,
        rounding_key: int | None,
    ) -> None:
        decay = update.decay if base.dim() > 1 else 1.0
        scales = [(j, -c) for j, c in enumerate(update.coefficients) if c]
        if self.family.rank and base.dim() > 1:
            factors = [self._factors(base, name, update.step, j, scale) for j, scale in scales]
            add_low_rank(to, base, factors, decay=decay, rounding_key=rounding_key)
            return
        directions = [
            Direction(key_of(self.seed, update.step, j, number_of(name)), scale, self.family.kind)
            for j, scale in scales
        ]
        add_directions(to, base, directions, decay=decay, rounding_key=rounding_key)

    def _factors(
        self, base: torch.Tensor, name: str, step: int, j: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """scale x U [rank, rows] of this step and V [rank, columns] of its window."""
        rows = base.shape[0]
        left = Direction(key_of(self.seed, step, j, number_of(name)), scale, self.family.kind)
        window = key_of(self.seed, step // self.family.window, number_of(name + WINDOW))
        right = Direction(window, 1.0, self.family.kind)
        return (
            values(left, self.family.rank * rows, base.device).view(-1, rows),
            values(right, self.family.rank * (base.numel() // rows), base.device).view(
                self.family.rank, -1
            ),
        )
