"""A byte for each element, times a scale of its block: FP8 as DeepSeek and Qwen have it, per row, per tensor; INT8 alike,
with zeros or without.

    w[o, i] = (code[o, i] - zero[b]) * scale[b],   b = (o // rows of a block, i // columns of a block)

A tensor of more than two dimensions is as many matrices, each with blocks of its own; the blocks at its lower and right
edge may be cut. One product, rounded to float32, then to the output. What the files call `weight_scale_inv` is
multiplied too.

e4m3 ("fn": no infinities): OCP 8-bit Floating Point Specification 1.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ssdtune.kernels.formats import Part
from ssdtune.kernels.integers import put_rows, row_slices
from ssdtune.kernels.nibbles import SCALE_DTYPES, file_dtype, scale_of

CODES = {"F8_E4M3": "FP8", "I8": "INT8"}


@dataclasses.dataclass(frozen=True, slots=True)
class ScaledBytes:
    """block: rows and columns that share a scale; those of the matrix where there is one for all. codes: of CODES.
    scale: of SCALE_DTYPES. has_zeros: whether INT8 has a zero beside each scale; else they are 0."""

    block: tuple[int, int]
    codes: str = "F8_E4M3"
    scale: str = "F32"
    has_zeros: bool = False

    def __post_init__(self) -> None:
        assert min(self.block) > 0, self.block
        assert self.codes in CODES, self.codes
        assert self.scale in SCALE_DTYPES, self.scale
        assert not self.has_zeros or self.codes == "I8", self.codes

    @property
    def label(self) -> str:
        """For messages and tables."""
        zeros = " with zeros" if self.has_zeros else ""
        return f"{CODES[self.codes]}{zeros}, blocks of {self.block[0]} x {self.block[1]}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Codes; scales; zeros."""
        *matrices, rows, width = shape
        blocks = (*matrices, -(-rows // self.block[0]), -(-width // self.block[1]))
        return (
            Part("codes", self.codes, tuple(shape)),
            Part("scales", file_dtype(self.scale), blocks),
            *([Part("zeros", "I8", blocks)] * self.has_zeros),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        for matrix, codes, *of_blocks in self.matrices(parts, out):
            for some in row_slices(*matrix.shape):
                put_rows(matrix[some], codes[some], *self.scaling(of_blocks, some), self.block[1])

    def matrices(
        self, parts: Sequence[torch.Tensor], out: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Of each matrix: the output, then its parts, all of two dimensions."""
        return zip(*(x.unsqueeze(0).flatten(0, -3) for x in (out, *parts)), strict=True)

    def scaling(
        self, of_blocks: Sequence[torch.Tensor], some: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros and scales of a few rows of a matrix, float32 [rows, blocks of columns]. of_blocks: its parts but the
        codes."""
        scales, *zeros = of_blocks
        blocks = torch.arange(some.start, some.stop, device=scales.device) // self.block[0]
        found = scale_of(scales[blocks], self.scale)
        return zeros[0][blocks].float() if zeros else torch.zeros_like(found), found
