"""Which elements of the weights move: all, a random share, or those of small magnitude.

    random      element i of a parameter moves where the 8-bit field i of a key of its own is below 256 x share: the
                same ones in all steps (share is rounded to 1/256)
    magnitude   it moves where |theta_i| <= h, theta as it is in that step and h fixed before the first one: of each
                parameter, the largest of its `share` smallest magnitudes in the base model (Sparse-MeZO: Liu et al.,
                arXiv 2402.15751, with a threshold for each parameter)

An element that does not move is neither perturbed nor updated nor decayed.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.kernels.noise import Direction, add_directions
from ssdtune.kernels.philox import key_of, number_of

NONE, RANDOM, MAGNITUDE = "none", "random", "magnitude"
KINDS = (NONE, RANDOM, MAGNITUDE)
FIELDS = 256
OF_THE_MASK = " of the mask"  # makes another number of a parameter's name
PART = 1 << 22  # elements whose magnitudes are counted at a time


class MaskError(SSDTuneError):
    """A mask that lets nothing move."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mask:
    """kind: as above. share: of each parameter's elements, those that move."""

    kind: str = NONE
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not 0 < self.share <= 1:
            raise MaskError(
                f"mask {self.kind!r} of a share of {self.share:g}: known are {', '.join(KINDS)}, of shares above 0 and "
                "at most 1."
            )


ALL_MOVE = Mask()


class Masks:
    """Of one run's parameters. What has a threshold is seen for the first time before it has moved."""

    def __init__(self, seed: int, mask: Mask) -> None:
        self.seed, self.mask = seed, mask
        self._thresholds: dict[str, float] = {}

    def see(self, name: str, parameter: torch.Tensor) -> None:
        """A parameter is about to move."""
        if self.mask.kind == MAGNITUDE and name not in self._thresholds:
            num = max(1, round(self.mask.share * parameter.numel()))
            self._thresholds[name] = smallest_magnitude(parameter, num)

    def of(self, name: str, part: torch.Tensor, first: int) -> torch.Tensor:
        """Which elements of a part move, bool; first: number of the part's first element, a multiple of a tile."""
        if self.mask.kind == MAGNITUDE:
            return part.abs() <= self._thresholds[name]
        limit = max(1, round(self.mask.share * FIELDS))
        if limit >= FIELDS:
            return torch.ones_like(part, dtype=torch.bool)
        key = key_of(self.seed, number_of(name + OF_THE_MASK))
        drawn = torch.zeros(part.shape, dtype=torch.float32, device=part.device)
        add_directions(drawn, drawn, [Direction(key, 1.0)], first=first)
        return drawn < _values()[limit]


@functools.cache
def _values() -> list[float]:
    """What an 8-bit field stands for, ascending."""
    return Direction(0, 1.0).values()


def smallest_magnitude(tensor: torch.Tensor, k: int) -> float:
    """The k-th smallest magnitude, k from 1: exact, counted by the upper and then the lower 16 bits of float32."""
    flat = tensor.reshape(-1)
    high, before = _bin(_counts(flat, None), k)
    low, _ = _bin(_counts(flat, high), k - before)
    return float(torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32))


def _counts(flat: torch.Tensor, high: int | None) -> torch.Tensor:
    """How many magnitudes have each value of their upper 16 bits, or of the lower ones of those with these upper."""
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=flat.device)
    for part in flat.split(PART):
        bits = part.float().abs().view(torch.int32)
        found = bits >> 16 if high is None else bits[bits >> 16 == high] & 0xFFFF
        counts += torch.bincount(found, minlength=1 << 16)
    return counts


def _bin(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """(the value that the k-th smallest has, how many are smaller than it)."""
    sums = counts.cumsum(0)
    found = int((sums < k).sum())
    return found, int(sums[found] - counts[found])
