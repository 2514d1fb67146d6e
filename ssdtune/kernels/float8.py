"""A byte for each element, times a scale of its block: FP8 as DeepSeek and Qwen have it, per row, per tensor; INT8 alike.

    w[o, i] = code[o, i] * scale[o // rows of a block, i // columns of a block]

A tensor of more than two dimensions is as many matrices, each with blocks of its own; the blocks at its lower and right
edge may be cut. One product, rounded to float32, then to the output. What the files call `weight_scale_inv` is
multiplied too.

e4m3 ("fn": no infinities): OCP 8-bit Floating Point Specification 1.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ssdtune.kernels.formats import Part
from ssdtune.kernels.integers import put_rows, row_slices
from ssdtune.kernels.nibbles import SCALE_DTYPES, file_dtype, scale_of

CODES = {"F8_E4M3": "FP8", "I8": "INT8"}


@dataclasses.dataclass(frozen=True, slots=True)
class ScaledBytes:
    """block: rows and columns that share a scale; those of the matrix where there is one for all. codes: of CODES.
    scale: of SCALE_DTYPES."""

    block: tuple[int, int]
    codes: str = "F8_E4M3"
    scale: str = "F32"

    def __post_init__(self) -> None:
        assert min(self.block) > 0, self.block
        assert self.codes in CODES, self.codes
        assert self.scale in SCALE_DTYPES, self.scale

    @property
    def label(self) -> str:
        """For messages and tables."""
        return f"{CODES[self.codes]}, blocks of {self.block[0]} x {self.block[1]}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Codes; scales."""
        *matrices, rows, width = shape
        scales = (*matrices, -(-rows // self.block[0]), -(-width // self.block[1]))
        return (
            Part("codes", self.codes, tuple(shape)),
            Part("scales", file_dtype(self.scale), scales),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        codes, scales, matrices = self.matrices(parts, out)
        for matrix, found, of_blocks in zip(matrices, codes, scales, strict=True):
            for some in row_slices(*matrix.shape):
                put_rows(matrix[some], found[some], *self.scaling(of_blocks, some), self.block[1])

    def matrices(
        self, parts: Sequence[torch.Tensor], out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales and the output, each [matrices, rows, columns]."""
        codes, scales = parts
        return tuple(x.reshape(-1, *x.shape[-2:]) for x in (codes, scales, out))  # type: ignore[return-value]

    def scaling(self, scales: torch.Tensor, some: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros and scales of a few rows of a matrix, float32 [rows, blocks of columns]."""
        blocks = torch.arange(some.start, some.stop, device=scales.device) // self.block[0]
        found = scale_of(scales[blocks], self.scale)
        return torch.zeros_like(found), found
