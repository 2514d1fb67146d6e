"""Gradient estimates from losses alone. Each estimator says at which points losses are wanted, and what they mean.

A *variant* of the weights is the weights themselves, or weights shifted along one random direction z_j by a scale:
theta + scale z_j, z_j 0 where a mask says so. An estimate is one number g_j for each direction; what is made of
sum_j g_j z_j is the rule's (`rules.py`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Protocol

from ssdtune.errors import SSDTuneError
from ssdtune.kernels.noise import GAUSSIAN, RADEMACHER
from ssdtune.zeroth_order.masks import ALL_MOVE, NONE, Mask
from ssdtune.zeroth_order.rules import Term
from ssdtune.zeroth_order.updates import Family

# Of losses, relatively: a spread below is what rounding left of none. Four times the distance between two floats.
NO_SPREAD = 2.0**-50
SMALLEST_EPS = 2.0**-126  # the smallest normal number of float32: eps z is made in it


class EstimatorError(SSDTuneError):
    """A setting that estimates nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shift:
    """The weights plus scale x z_j, j = direction."""

    direction: int
    scale: float

    def term(self, step: int) -> Term:
        """What it adds in a step."""
        return Term(step, self.direction, self.scale)


class Estimator(Protocol):
    """How gradients are estimated."""

    @property
    def family(self) -> Family:
        """What the directions look like."""
        ...

    @property
    def variants(self) -> Sequence[Shift | None]:
        """Where losses are wanted; None: at the weights as they are."""
        ...

    def gradients(self, losses: Sequence[float]) -> list[float]:
        """g_j for each direction, from the loss of each variant. All finite."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeZO:
    """Two-sided differences (SPSA), averaged over directions: n-SPSA.

    g_j = (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps) / n, z_j Gaussian
    (Malladi et al., "Fine-tuning language models with just forward passes", arXiv 2305.17333, Definition 1 and Alg. 1)
    """

    eps: float = 1e-3
    num_directions: int = 1
    mask: Mask = ALL_MOVE

    def __post_init__(self) -> None:
        _check(self.eps, self.num_directions, 1)

    @property
    def family(self) -> Family:
        """A normal number for each element."""
        return Family(GAUSSIAN, mask=self.mask)

    @property
    def variants(self) -> Sequence[Shift | None]:
        """Both sides of each direction, one after the other."""
        return [Shift(j, side * self.eps) for j in range(self.num_directions) for side in (1, -1)]

    def gradients(self, losses: Sequence[float]) -> list[float]:
        """As above."""
        pairs = zip(losses[::2], losses[1::2], strict=True)
        return [(up - down) / (2 * self.eps) / self.num_directions for up, down in pairs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FZOO:
    """One-sided differences along many directions of signs, scaled by how far the losses spread.

    g_j = (L(theta + eps u_j) - L(theta)) / (eps n sigma), u_j Rademacher, sigma^2 = sum_j (L_j - mean)^2 / (n - 1)
    (Dang et al., "FZOO: Fast zeroth-order optimizer for fine-tuning large language models towards Adam-scale speed",
    arXiv 2506.09034). With each step's own losses: theirs of earlier steps are not used again.
    """

    eps: float = 1e-3
    num_directions: int = 8
    mask: Mask = ALL_MOVE

    def __post_init__(self) -> None:
        _check(self.eps, self.num_directions, 2)

    @property
    def family(self) -> Family:
        """A sign for each element."""
        return Family(RADEMACHER, mask=self.mask)

    @property
    def variants(self) -> Sequence[Shift | None]:
        """The weights, then one side of each direction."""
        return [None, *(Shift(j, self.eps) for j in range(self.num_directions))]

    def gradients(self, losses: Sequence[float]) -> list[float]:
        """As above; nothing where all losses are equal but for rounding, for then they say nothing."""
        base, *shifted = losses
        spread = statistics.stdev(shifted)
        if spread <= NO_SPREAD * max(map(abs, shifted)):
            return [0.0] * self.num_directions
        return [(loss - base) / (self.eps * self.num_directions * spread) for loss in shifted]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LOZO(MeZO):
    """Two-sided differences along matrices of low rank, one factor of which stays for a window of steps.

    g_j = (L(theta + eps U_j V^T) - L(theta - eps U_j V^T)) / (2 eps) / rank / n, theta -= lr sum_j g_j U_j V^T,
    U_j [rows, rank] and V [columns, rank] Gaussian, U_j new at every step, V at every window's beginning; parameters of
    one dimension as in MeZO (Chen et al., "Enhancing zeroth-order fine-tuning for language models with low-rank
    structures", arXiv 2410.07698, Alg. 1). The authors' code leaves / rank out: its learning rates times rank are ours.
    Of parameters of three dimensions, experts' weights, neither says anything: `updates.as_matrix` does.
    """

    rank: int = 2
    window: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask.kind != NONE:
            raise EstimatorError("LOZO's directions have no mask: leave it out, or take MeZO.")
        if self.rank < 1 or self.window < 1:
            raise EstimatorError(
                f"rank is {self.rank} and window is {self.window}; both must be 1 or more."
            )

    @property
    def family(self) -> Family:
        """U V^T."""
        return Family(GAUSSIAN, self.rank, self.window)

    def gradients(self, losses: Sequence[float]) -> list[float]:
        """As above."""
        return [g / self.rank for g in super().gradients(losses)]


def _check(eps: float, num_directions: int, least: int) -> None:
    if not SMALLEST_EPS <= eps < math.inf:
        raise EstimatorError(
            f"eps is {eps:g}: weights that are not moved, in float32, tell nothing of the gradient.\n"
            f"Set one of {SMALLEST_EPS:g} or more; 1e-3 is usual."
        )
    if num_directions < least:
        raise EstimatorError(f"num_directions is {num_directions}; it must be {least} or more.")
