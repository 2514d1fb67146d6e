"""How far tensors are from others: sums of squares. The one definition for errors of weights and of outputs."""

from __future__ import annotations

import dataclasses

import torch

AT_A_TIME = 1 << 22  # elements: 16 MB in float32


@dataclasses.dataclass(slots=True)
class Squares:
    """Sums of squares: of a difference and of what it is a difference to. Differences are taken in float32, sums in
    float64."""

    error: float = 0.0
    whole: float = 0.0

    @property
    def relative(self) -> float:
        """error / whole; 0 where there is nothing but zeros to differ from."""
        return self.error / self.whole if self.whole else 0.0

    @classmethod
    def of(cls, found: torch.Tensor, wanted: torch.Tensor) -> Squares:
        """Those of two tensors of one shape."""
        squares = cls()
        squares.add(found, wanted)
        return squares

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """Adds those of two tensors of one shape, some megabytes at a time."""
        pieces = (t.detach().reshape(-1).split(AT_A_TIME) for t in (found, wanted))
        for one, other in zip(*pieces, strict=True):
            reference = other.float()
            self.error += _square(one.float() - reference)
            self.whole += _square(reference)


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
