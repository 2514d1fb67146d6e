"""What a step does to the weights, as a few numbers: the rest is made again from the seed.

    theta_{t+1} = round(theta_t * decay + sum_j (-coefficient_j) z_j)    z_j from (seed, t, j, parameter's name)

in float32, from left to right (`kernels/noise.py`), rounded once. bfloat16 weights are rounded at random: an update is
far smaller than the distance between two of them, and rounding to nearest would lose it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ssdtune.kernels.noise import Direction, add_directions
from ssdtune.kernels.philox import key_of, number_of


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """One step. step: its number, which its directions hang on. coefficients: learning rate times g_j, for each
    direction. decay: what parameters of two and more dimensions are multiplied by, 1 - lr x weight decay."""

    step: int
    coefficients: tuple[float, ...]
    decay: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Directions:
    """All random directions of a run. kind: as in `kernels.noise`."""

    seed: int
    kind: str

    def direction(self, name: str, step: int, j: int, scale: float) -> Direction:
        """scale x z_j of one parameter in this step."""
        return Direction(key_of(self.seed, step, j, number_of(name)), scale, self.kind)

    def shift(
        self, to: torch.Tensor, base: torch.Tensor, name: str, *, step: int, j: int, scale: float
    ) -> None:
        """to = round(base + scale z_j), to nearest."""
        add_directions(to, base, [self.direction(name, step, j, scale)])

    def apply(self, parameter: torch.Tensor, name: str, updates: Sequence[Update]) -> None:
        """Takes these steps with a parameter, in place, each rounded by itself."""
        for update in updates:
            add_directions(
                parameter,
                parameter,
                [
                    self.direction(name, update.step, j, -coefficient)
                    for j, coefficient in enumerate(update.coefficients)
                ],
                decay=update.decay if parameter.dim() > 1 else 1.0,
                rounding_key=key_of(self.seed, update.step, number_of(name)),
            )
