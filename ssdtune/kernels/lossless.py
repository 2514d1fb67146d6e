"""Lossless bfloat16: the lower byte of every value as it is, a code of 3 or 4 bits for the upper one.

    value = upper << 8 | lower          upper = dictionary[code], or the next escape where code is the largest

The upper byte is the sign and seven bits of the exponent: of trained weights, whose exponents have an entropy of 2.6-3
bits, the 15 most frequent upper bytes cover all but .02-.2 %, the 7 most frequent ones all but 3-10 %. Nothing is said
about values: whatever 16 bits there were come back. 12 or 11.3-11.8 bits a weight.

The dictionary has as many entries as there are codes that are no escape. Codes lie in slices as `affine.py` has them,
(4) or (2, 1), the last tile filled up with anything. Escapes stand in the order of their elements; those of chunk c of
CHUNK elements are escapes[offsets[c]:offsets[c + 1]], so that chunks can be decoded alone. Parts in which a chunk has
another number of escapes than its codes say are damaged: decoding raises DamagedError, whatever `out` holds by then.

That the dictionary has signed halves of exponents instead of exponents makes decoding a shuffle and an interleaving of
bytes. It costs what one entry more or less does: with 4 bits a hundredth of a bit a weight, with 3 bits a tenth.
Exponents coded apart: DFloat11 (arXiv 2504.11651), ZipNN (2411.05239); at fixed length: ZipServ (2603.17435).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.kernels.affine import LANES, ORDERS, TILE, join_slices, split_codes
from ssdtune.kernels.apart import in_order
from ssdtune.kernels.formats import Part, num_elements

CHUNK = 8 * TILE  # elements whose escapes can be found without those before
PIECE = 1 << 20  # elements that torch's operators decode at a time, a multiple of CHUNK
ENCODED = 1 << 19  # elements that each thread encodes at a time, another one
MOST_ESCAPES = 2**31 - 1  # what offsets can count
NUM_BYTES = {"U8": 1, "I32": 4}  # of an element of a part


class DamagedError(SSDTuneError):
    """Parts that contradict each other: not what `pack` wrote."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lossless:
    """bits: of a code, 3 or 4. num_escapes: of the tensor; its parts' shapes depend on it."""

    bits: int
    num_escapes: int

    def __post_init__(self) -> None:
        assert self.bits in (3, 4), self.bits
        assert 0 <= self.num_escapes <= MOST_ESCAPES, self.num_escapes

    @property
    def label(self) -> str:
        """For messages and tables."""
        return f"lossless bfloat16, {self.bits}-bit dictionary"

    @property
    def escape(self) -> int:
        """The code of what is not in the dictionary."""
        return 2**self.bits - 1

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Lower bytes; slices of codes, most significant first; dictionary; escapes; where each chunk's begin, the end
        of the last."""
        n = num_elements(shape)
        codes = (
            Part(f"codes.{i}", "U8", (-(-n // TILE) * LANES * width,))
            for i, width in enumerate(ORDERS[self.bits])
        )
        return (
            Part("lower", "U8", (n,)),
            *codes,
            Part("dictionary", "U8", (self.escape,)),
            Part("escapes", "U8", (self.num_escapes,)),
            Part("offsets", "I32", (-(-n // CHUNK) + 1,)),
        )

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Of all parts of a tensor of this shape."""
        return sum(num_elements(part.shape) * NUM_BYTES[part.dtype] for part in self.parts(shape))

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition. Raises DamagedError."""
        lower, *slices, dictionary, escapes, offsets = parts
        flat = out.view(-1)
        table = torch.nn.functional.pad(dictionary, (0, 1))
        for first in range(0, flat.numel(), PIECE):
            count = min(PIECE, flat.numel() - first)
            tiles = slice(first // TILE, -(-(first + count) // TILE))
            codes = join_slices(
                [
                    s[tiles.start * LANES * w : tiles.stop * LANES * w]
                    for s, w in zip(slices, ORDERS[self.bits], strict=True)
                ],
                ORDERS[self.bits],
            )[:count]
            chunks = slice(first // CHUNK, -(-(first + count) // CHUNK) + 1)
            is_escape = codes == self.escape
            begin, end = self._checked(offsets[chunks], is_escape)
            upper = table.gather(0, codes.long()).masked_scatter(is_escape, escapes[begin:end])
            both = torch.stack((lower[first : first + count], upper), dim=-1)
            flat[first : first + count] = both.view(torch.bfloat16).view(-1)

    def _checked(self, offsets: torch.Tensor, is_escape: torch.Tensor) -> tuple[int, int]:
        """Where the escapes of some chunks begin and end. offsets: of these chunks and the next."""
        begin, end = int(offsets[0]), int(offsets[-1])
        is_agreed = torch.equal(offsets.long().diff(), _counts(is_escape))
        if begin < 0 or end > self.num_escapes or not is_agreed:
            raise damaged(self)
        return begin, end


def damaged(format: Lossless) -> DamagedError:
    """What is raised where parts contradict each other."""
    return DamagedError(
        f"cannot decode a tensor packed as {format.label} with {format.num_escapes:,} escapes: its codes ask for "
        "others than its offsets say, so the file is damaged. Pack the model again, or copy the file anew."
    )


def encode(values: torch.Tensor, bits: int = 4) -> tuple[Lossless, list[torch.Tensor]] | None:
    """The format and the parts of a tensor, flat, on the CPU; None where they would take as many bytes as the tensor.

    values: bfloat16; a copy is made of what is not contiguous. Beside the parts it takes some 40 bytes for each of
    ENCODED elements, on each thread.
    """
    counts = _histogram(values)
    format = _format(counts, bits)
    if format is None or format.num_bytes(tuple(values.shape)) >= 2 * values.numel():
        return None
    return format, _pack(values, format, counts)


def pack(values: torch.Tensor, bits: int = 4) -> tuple[Lossless, list[torch.Tensor]]:
    """As `encode`, however many bytes it takes."""
    counts = _histogram(values)
    format = _format(counts, bits)
    if format is None:
        raise SSDTuneError(
            f"cannot pack a tensor of {values.numel():,} values losslessly: more than {MOST_ESCAPES:,} of them have "
            "none of the frequent exponents. Write it as it is."
        )
    return format, _pack(values, format, counts)


def _format(counts: torch.Tensor, bits: int) -> Lossless | None:
    """None where it would have more escapes than offsets can count. counts: of each upper byte."""
    frequent = counts.sort(descending=True).values
    num_escapes = int(frequent[2**bits - 1 :].sum())
    return Lossless(bits, num_escapes) if num_escapes <= MOST_ESCAPES else None


def _pack(values: torch.Tensor, format: Lossless, counts: torch.Tensor) -> list[torch.Tensor]:
    """As `encode`. counts: of each upper byte."""
    dictionary = counts.sort(descending=True, stable=True).indices[: format.escape].to(torch.uint8)
    code_of = torch.full((256,), format.escape, dtype=torch.uint8)
    code_of[dictionary.long()] = torch.arange(format.escape, dtype=torch.uint8)
    made = [
        torch.empty(part.shape, dtype=torch.int32 if part.dtype == "I32" else torch.uint8)
        for part in format.parts(tuple(values.shape))
    ]
    lower, *slices, kept, escapes, offsets = made
    kept.copy_(dictionary)

    def code(piece: _Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes its lower bytes and its codes; its escapes, and how many each chunk of it has."""
        low, upper = piece.halves()
        lower[piece.first : piece.first + len(low)] = low
        codes = code_of.gather(0, upper.long())
        tile = piece.first // TILE * LANES
        packed = split_codes(codes, ORDERS[format.bits])
        for to, found, width in zip(slices, packed, ORDERS[format.bits], strict=True):
            to[tile * width :][: len(found)] = found
        is_escape = codes == format.escape
        return upper[is_escape], _counts(is_escape)

    pieces = _pieces(values)
    offsets[0] = num_done = 0
    for piece, (found, counted) in zip(pieces, in_order(code, pieces), strict=True):
        ends = num_done + counted.cumsum(0)
        offsets[piece.first // CHUNK + 1 :][: len(ends)] = ends
        escapes[num_done : int(ends[-1])] = found
        num_done = int(ends[-1])
    return made


def _histogram(values: torch.Tensor) -> torch.Tensor:
    """How often each upper byte is there, int64 [256]."""
    assert values.dtype == torch.bfloat16, values.dtype
    counts = torch.zeros(256, dtype=torch.int64)
    for found in in_order(lambda piece: piece.halves()[1].bincount(minlength=256), _pieces(values)):
        counts += found
    return counts


class _Piece(NamedTuple):
    """first: number of the first element. values: bfloat16, flat."""

    first: int
    values: torch.Tensor

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper bytes, on the CPU."""
        both = self.values.cpu().view(torch.uint8).view(-1, 2)
        return both[:, 0], both[:, 1].contiguous()


def _pieces(values: torch.Tensor) -> list[_Piece]:
    """Of ENCODED elements, one after the other."""
    flat = values.detach().reshape(-1)
    firsts = range(0, flat.numel(), ENCODED)
    return [_Piece(first, flat[first : first + ENCODED]) for first in firsts]


def _counts(is_escape: torch.Tensor) -> torch.Tensor:
    """Escapes of each chunk, int64. is_escape: from the beginning of a chunk on."""
    padded = torch.nn.functional.pad(is_escape, (0, -len(is_escape) % CHUNK))
    return padded.view(-1, CHUNK).sum(dim=1)
