"""ggml's types of tensors that llama.cpp's converter has moved, or changed by a constant: as the model has them.

Decoding is that of the stored types (`ggml.py`); here is what comes before or after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ssdtune.kernels.formats import Part
from ssdtune.kernels.ggml import CHUNK, Ggml
from ssdtune.kernels.unpack import unpack


@dataclasses.dataclass(frozen=True, slots=True)
class PairedRows:
    """Rows of query and key projections as llama.cpp turns them: it rotates neighbours, where Hugging Face rotates rows
    that are half a head apart. Row 2 i + j of a head there is row i + j * half here.

    num_heads: what the first dimension is made of.
    """

    stored: Ggml
    num_heads: int

    @property
    def label(self) -> str:
        """For messages and tables."""
        return f"{self.stored.label}, rotated pairs of rows"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """As the stored format. The first dimension is a multiple of twice the heads."""
        return self.stored.parts(shape)

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says. Rows are moved while they are packed, some heads at a time."""
        half = out.shape[0] // self.num_heads // 2
        pairs = parts[0].view(self.num_heads, half, 2, -1)
        heads = out.view(self.num_heads, -1)
        step = max(1, CHUNK // heads.shape[1])
        for first in range(0, self.num_heads, step):
            some = slice(first, first + step)
            blocks = pairs[some].transpose(1, 2).reshape(-1)
            unpack(self.stored, (blocks,), heads[some])


@dataclasses.dataclass(frozen=True, slots=True)
class LessOne:
    """Weights of Gemma's norms: Hugging Face has w and multiplies by 1 + w, llama.cpp's files have 1 + w. One is taken
    away in float32, before the rounding to the output."""

    stored: Ggml

    @property
    def label(self) -> str:
        """For messages and tables."""
        return f"{self.stored.label}, less one"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """As the stored format."""
        return self.stored.parts(shape)

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: norms are small, all at once."""
        values = torch.empty(out.shape, device=out.device)
        unpack(self.stored, parts, values)
        out.copy_(values - 1)


@dataclasses.dataclass(frozen=True, slots=True)
class TurnedExperts:
    """gpt-oss's experts. The model has matrices [experts, columns, rows], in which rows of gate and up take turns; the
    file has [experts, rows, columns] of each for itself. Biases have rows alone: [experts, rows].

    stored: types of the file's tensors, in the order of turns.
    """

    stored: tuple[Ggml, ...]

    @property
    def label(self) -> str:
        """For messages and tables."""
        kinds = dict.fromkeys(one.label for one in self.stored)
        return f"{', '.join(kinds)}, transposed"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Blocks of each file tensor, one after the other. The last dimension is rows of all of them."""
        *others, rows = shape
        own = (*others, rows // len(self.stored))
        return tuple(
            dataclasses.replace(part, suffix=f"{part.suffix}.{number}")
            for number, one in enumerate(self.stored)
            for part in one.parts(own)
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says. Some rows at a time."""
        turns = len(self.stored)
        experts = (
            out if out.dim() == 3 else out.view(1, 1, -1)
        )  # of a bias: one row after the other
        num, width, rows = experts.shape
        sources = [part.view(num, rows // turns, -1) for part in parts]
        step = max(1, CHUNK // (turns * width))
        for number, turned in enumerate(experts):
            for first in range(0, rows // turns, step):
                some = slice(first, min(first + step, rows // turns))
                made = out.new_empty(turns, some.stop - first, width)
                for one, source, matrix in zip(self.stored, sources, made, strict=True):
                    unpack(one, (source[number, some].view(-1),), matrix)
                turned[:, turns * first : turns * some.stop] = made.permute(2, 1, 0).flatten(1)
