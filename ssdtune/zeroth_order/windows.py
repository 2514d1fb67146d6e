"""LOZO's windows as matrices of low rank: what is stored of the weights stays as it is while V does.

As long as V stays the same, steps add up in the other factor. A parameter that was theta_0 when its window began is

    theta_t = round(theta_0 * decay_t + A_t V^T)    A_{t+1} = A_t * decay + what the step adds, A_0 = 0

A [rank, rows] in float32, from left to right; decay_t the product of the steps' decays, rounded to float32 once. Where
theta_t is read it is rounded to nearest. When the window is over it is rounded at random (16 bits) and becomes the next
theta_0: then, and only then, something of what is stored changes. A variant is round(theta_0 * decay_t + (A_t + scale U)
V^T). So whatever is made of a block takes one product, however many steps of the window there were. Parameters of one
dimension have an A of their own shape, which is added as it is. What a step adds:

    sgd       -lr sum_j g_j U_j: LOZO (`estimators.py`)
    lozo_m    -lr N_t, N_t = beta1 N_{t-1} + (1 - beta1) sum_j g_j U_j, from N_0 = sum_j g_j U_j. Where V has changed,
              N_{t-1} V_old^T V / columns stands for N_{t-1}: LOZO-M (Chen et al., arXiv 2410.07698; their code,
              optsuite/LOZO, medium_models/src/LOZOtrainer.py: lowrank_zo_update_momentum)

Other weights than those that the same steps make one by one, each of them rounded by itself.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch

from ssdtune.kernels.noise import add_directions, add_low_rank, add_values
from ssdtune.zeroth_order.rules import FOLLOW, LOZO_M, Rule, Term, Update
from ssdtune.zeroth_order.updates import Directions, Family, as_matrix, decay_of


@dataclasses.dataclass(frozen=True, slots=True)
class Sum:
    """What the steps of a window come to so far, for one parameter.

    window: its number. decay: what theta_0 is multiplied by. left: A, float32, flat. momentum: N of LOZO-M, likewise.
    """

    window: int
    decay: float
    left: torch.Tensor
    momentum: torch.Tensor | None = None


class Windows(Directions):
    """All random directions of a run of LOZO, and the steps that it has taken.

    A change of what is stored is a whole window: an `Update` with the number of its last step, and no gradients. A of
    each parameter is kept from step to step; where it is wanted of an earlier time it is made again from the steps.
    """

    def __init__(self, seed: int, family: Family, rule: Rule = FOLLOW) -> None:
        super().__init__(seed, family, rule)
        self._taken: list[Update] = []
        self._window = 0  # the one under way
        # After how many steps that were taken, and what they come to.
        self._sums: dict[tuple[str, torch.device], tuple[int, Sum]] = {}

    @property
    def is_apart(self) -> bool:
        """Whether the window under way has steps."""
        return bool(self._taken) and self._window_of(self._taken[-1]) == self._window

    def take(self, update: Update) -> list[Update]:
        """One more step. It changes nothing of what is stored."""
        self._taken.append(update)
        return []

    def ended(self, num_steps: int) -> list[Update]:
        """So many steps are over, those that were skipped too; the window that is, where it had steps."""
        last, had_steps = (self._window + 1) * self.family.window - 1, self.is_apart
        self._window = num_steps // self.family.window
        return [Update(last, (), 0.0)] if num_steps > last and had_steps else []

    def make(self, to: torch.Tensor, base: torch.Tensor, name: str, term: Term | None) -> None:
        """to = round(theta + term), to nearest; None: theta itself. base: theta_0."""
        if not (self.is_apart and base.numel()):
            super().make(to, base, name, term)
            return
        found = self._sum(name, base, len(self._taken))
        if term is not None:
            left = torch.empty_like(found.left)
            add_directions(left, found.left, self._directions(name, [term]))
            found = dataclasses.replace(found, left=left)
        self._add_sum(to, base, name, found)

    def apply(self, parameter: torch.Tensor, name: str, updates: Sequence[Update]) -> None:
        """Takes these windows with a parameter's theta_0, in place, each rounded by itself."""
        for update in updates if parameter.numel() else ():
            end = bisect.bisect_right(self._taken, update.step, key=_step)
            found = self._sum(name, parameter, end)
            key = self._key(update, name)
            self._add_sum(parameter, parameter, name, found, rounding_key=key)

    def has_moves(self, dim: int) -> bool:
        """None: what is decoded takes a sum, not directions."""
        return False

    def _window_of(self, update: Update) -> int:
        return update.step // self.family.window

    def _add_sum(
        self,
        to: torch.Tensor,
        base: torch.Tensor,
        name: str,
        found: Sum,
        *,
        rounding_key: int | None = None,
    ) -> None:
        """to = round(base * decay + A V^T)."""
        if base.dim() < 2:
            add_values(to, base, found.left.view(base.shape), rounding_key=rounding_key)
            return
        factors = (
            found.left.view(self.family.rank, -1),
            self._right(base, name, found.window),
        )
        add_low_rank(to, base, [factors], decay=found.decay, rounding_key=rounding_key)

    def _sum(self, name: str, like: torch.Tensor, end: int) -> Sum:
        """After the first `end` of the steps that were taken. like: the parameter."""
        key = name, like.device
        at, found = self._sums.get(key, (0, None))
        if at > end:
            at, found = 0, None
        if self.rule.kind != LOZO_M:  # whose N reaches back into earlier windows
            first = self._window_of(self._taken[end - 1]) * self.family.window
            at = max(at, bisect.bisect_left(self._taken, first, key=_step))
        for update in self._taken[at:end]:
            found = self._after(found, update, name, like)
        assert found is not None
        self._sums[key] = end, found
        return found

    def _after(self, before: Sum | None, update: Update, name: str, like: torch.Tensor) -> Sum:
        """With one more step."""
        if before is None or before.window != self._window_of(update):
            before = self._begun(before, update, name, like)
        left, decay = torch.empty_like(before.left), decay_of(update, like.dim())
        momentum = None
        if self.rule.kind == LOZO_M:
            momentum = self._momentum(before.momentum, update, name, like=left)
            add_values(left, before.left, momentum * -update.rate, decay=decay)
        else:
            added = self._directions(name, self.rule.terms(update))
            add_directions(left, before.left, added, decay=decay)
        return Sum(before.window, before.decay * decay, left, momentum)

    def _begun(self, before: Sum | None, update: Update, name: str, like: torch.Tensor) -> Sum:
        """Of an update's window before its first step. before: of an earlier window."""
        window, momentum = self._window_of(update), None
        if before is not None and before.momentum is not None:
            momentum = before.momentum
            if like.dim() > 1:
                old, new = (self._right(like, name, w) for w in (before.window, window))
                momentum = along(momentum.view(self.family.rank, -1), old, new).view(-1)
        numel = _num_sums(like.shape, self.family.rank)
        return Sum(window, 1.0, torch.zeros(numel, device=like.device), momentum)

    def _momentum(
        self, before: torch.Tensor | None, update: Update, name: str, *, like: torch.Tensor
    ) -> torch.Tensor:
        """N after a step."""
        beta = self.rule.beta1
        share = 1.0 if before is None else 1 - beta
        before = torch.zeros_like(like) if before is None else before
        terms = [Term(update.step, j, share * g) for j, g in enumerate(update.gradients) if g]
        after = torch.empty_like(like)
        add_directions(after, before, self._directions(name, terms), decay=beta)
        return after


def along(momentum: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """N V_old^T V / columns: what stands for N [rank, rows] when V [rank, columns] is another.

    Each number of V_old^T V is exact but for one rounding: products of float32 are exact in float64, and `fsum` rounds
    once, whatever the order. N times them is added up from left to right, in float32.
    """
    turned: list[torch.Tensor] = []
    for column in new.double():
        total = torch.zeros_like(momentum[0])
        for rows, other in zip(momentum, old.double(), strict=True):
            total = total + rows * (math.fsum((other * column).tolist()) / len(column))
        turned.append(total)
    return torch.stack(turned)


def sums_bytes(shapes: Iterable[Sequence[int]], family: Family, rule: Rule) -> int:
    """What is kept of the window under way, for parameters of these shapes."""
    num = sum(_num_sums(shape, family.rank) for shape in shapes)
    return num * torch.float32.itemsize * (2 if rule.kind == LOZO_M else 1)


def _num_sums(shape: Sequence[int], rank: int) -> int:
    """Numbers of A."""
    return rank * as_matrix(shape)[0] if len(shape) > 1 else math.prod(shape)


def _step(update: Update) -> int:
    return update.step
