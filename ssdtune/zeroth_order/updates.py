"""What a step does to the weights, as a few numbers: the rest is made again from the seed.

    theta_{t+1} = round(theta_t * decay + what the rule makes of the estimates)    z_j from (seed, t, j, parameter's name)

in float32, from left to right (`kernels/noise.py`), rounded once. Weights of 16 bits are rounded at random: an update is
far smaller than the distance between two of them, and rounding to nearest would lose it. A direction whose gradient is
0 is left out. Where a mask lets an element be, it stays as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssdtune.kernels.noise import (
    GAUSSIAN,
    LARGEST_GAUSSIAN,
    PART,
    Direction,
    add_directions,
    add_low_rank,
    add_values,
    values,
)
from ssdtune.kernels.philox import key_of, number_of
from ssdtune.kernels.unpack_add import Move
from ssdtune.zeroth_order.masks import ALL_MOVE, NONE, Mask, Masks
from ssdtune.zeroth_order.rules import FOLLOW, Rule, Term, Update, estimate_terms

WINDOW = " of the window"  # makes another number of a parameter's name, for V
# (to, base, number of their first element): moves a part of a parameter.
MovePart = Callable[[torch.Tensor, torch.Tensor, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """What random directions look like.

    kind: of their numbers, as in `kernels.noise`. rank: 0 for a number of its own for each element; else parameters of
    two and more dimensions, as matrices (`as_matrix`), move along U V^T with so many columns. window: for how many steps V
    stays the same. mask: where they are 0.
    """

    kind: str
    rank: int = 0
    window: int = 0
    mask: Mask = ALL_MOVE

    @property
    def reach(self) -> float:
        """No element of a direction is of a larger magnitude."""
        largest = LARGEST_GAUSSIAN if self.kind == GAUSSIAN else 1.0
        return self.rank * largest**2 if self.rank else largest


@dataclasses.dataclass(frozen=True)
class Directions:
    """All random directions of a run, and what steps make of them: here each one changes what is stored of the weights.
    `Windows` (`windows.py`) has another way."""

    seed: int
    family: Family
    rule: Rule = FOLLOW

    @functools.cached_property
    def masks(self) -> Masks:
        """Which elements move."""
        return Masks(self.seed, self.family.mask)

    @property
    def is_apart(self) -> bool:
        """Whether the weights are something else by now than what is stored of them after all changes."""
        return False

    def take(self, update: Update) -> list[Update]:
        """One more step; the changes of stored weights that come of it."""
        return [update]

    def ended(self, num_steps: int) -> list[Update]:
        """So many steps are over, those that were skipped too; the changes of stored weights that come of it."""
        return []

    def make(self, to: torch.Tensor, base: torch.Tensor, name: str, term: Term | None) -> None:
        """to = round(theta + term), to nearest; None: theta itself. base: what is stored of theta, after all changes."""
        if base.numel():  # of none there is no smallest magnitude, and no matrix of low rank
            self._add(to, base, name, [] if term is None else [term])

    def apply(self, parameter: torch.Tensor, name: str, updates: Sequence[Update]) -> None:
        """Takes these changes with what is stored of a parameter, in place, each rounded by itself."""
        for update in updates if parameter.numel() else ():
            decay, key = decay_of(update, parameter.dim()), self._key(update, name)
            if self.rule.is_linear:
                terms = self.rule.terms(update)
                self._add(parameter, parameter, name, terms, decay=decay, rounding_key=key)
            else:
                self._change(parameter, name, update, decay=decay, rounding_key=key)

    def has_moves(self, dim: int) -> bool:
        """Whether steps of a parameter of so many dimensions are sums of directions, whole and nothing of low rank."""
        is_whole = self.family.mask.kind == NONE and not (self.family.rank and dim > 1)
        return is_whole and self.rule.is_linear

    def shift_move(self, name: str, *, step: int, j: int, scale: float) -> Move:
        """What `make` does, for whoever decodes on the way; of a parameter that `has_moves`."""
        return Move(tuple(self._directions(name, [Term(step, j, scale)])), 1.0, None)

    def update_move(self, name: str, dim: int, update: Update) -> Move:
        """What `apply` does for one step, likewise. dim: of the parameter."""
        directions = self._directions(name, self.rule.terms(update))
        return Move(tuple(directions), decay_of(update, dim), self._key(update, name))

    def _key(self, update: Update, name: str) -> int:
        """For rounding at random."""
        return key_of(self.seed, update.step, number_of(name))

    def _add(
        self,
        to: torch.Tensor,
        base: torch.Tensor,
        name: str,
        terms: Sequence[Term],
        **how: Any,
    ) -> None:
        """to = round(base * decay + terms). how: decay and rounding_key as `add_directions` has them."""
        if self.family.rank and base.dim() > 1:
            add_low_rank(to, base, [self._factors(base, name, term) for term in terms], **how)
            return
        directions = self._directions(name, terms)
        if self.family.mask.kind == NONE:
            add_directions(to, base, directions, **how)
            return
        self._in_parts(
            to,
            base,
            name,
            lambda to, base, at: add_directions(to, base, directions, **how, first=at),
        )

    def _change(self, parameter: torch.Tensor, name: str, update: Update, **how: Any) -> None:
        """A step that is no sum of directions."""

        def move(to: torch.Tensor, base: torch.Tensor, first: int) -> None:
            def estimate(of: Update) -> torch.Tensor:
                found = torch.zeros(base.shape, dtype=torch.float32, device=base.device)
                listed = self._directions(name, estimate_terms(of))
                add_directions(found, found, listed, first=first)
                return found

            add_values(to, base, self.rule.change(update, estimate), **how, first=first)

        self._in_parts(parameter, parameter, name, move)

    def _in_parts(self, to: torch.Tensor, base: torch.Tensor, name: str, move: MovePart) -> None:
        """Moves what the mask lets move; a part at a time, since it takes memory."""
        self.masks.see(name, base)
        source, target = base.reshape(-1), to.contiguous().view(-1)
        for first in range(0, source.numel(), PART):
            part, out = source[first : first + PART], target[first : first + PART]
            if self.family.mask.kind == NONE:
                move(out, part, first)
                continue
            moved, moves = torch.empty_like(part), self.masks.of(name, part, first)
            move(moved, part, first)
            out.copy_(torch.where(moves, moved, part))
        if not to.is_contiguous():
            to.copy_(target.view(to.shape))

    def _directions(self, name: str, terms: Sequence[Term]) -> list[Direction]:
        number, kind = number_of(name), self.family.kind
        return [Direction(key_of(self.seed, t.step, t.j, number), t.scale, kind) for t in terms]

    def _factors(
        self, base: torch.Tensor, name: str, term: Term
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """scale x U [rank, rows] of a step and V [rank, columns] of its window."""
        rows, _ = as_matrix(base.shape)
        (left,) = self._directions(name, [term])
        return (
            values(left, self.family.rank * rows, base.device).view(-1, rows),
            self._right(base, name, term.step // self.family.window),
        )

    def _right(self, base: torch.Tensor, name: str, window: int) -> torch.Tensor:
        """V [rank, columns] of a window."""
        key, rank = key_of(self.seed, window, number_of(name + WINDOW)), self.family.rank
        _, columns = as_matrix(base.shape)
        made = values(Direction(key, 1.0, self.family.kind), rank * columns, base.device)
        return made.view(rank, columns)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a parameter that moves along U V^T. Of three dimensions it is a stack of matrices, the experts' of a
    layer, which lie below each other: so the direction of each is of low rank, with a U of its own. Of more it is
    [first dimension, all others], as convolutions are unfolded."""
    if len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return shape[0], math.prod(shape[1:])


def decay_of(update: Update, dim: int) -> float:
    """Of a parameter of so many dimensions."""
    return update.decay if dim > 1 else 1.0
