"""Affine quantization to 1-8 bits, bit-nested: the first k bits of what is stored are a valid k-bit weight.

    w = (q - z_k) * s_k         z_k = (u_k + 1/2) * 2^(k - 8) - 1/2

A group of consecutive elements shares a scale s (bfloat16) and a zero u (uint8, on the 8-bit grid whatever the width:
what an 8-bit code loses below its k-th bit is centred by it). Both are stored for each width that can be read: all that
the slices allow, or, where codes are not nested, all bits alone. z is exact in float32, q - z too; the product is
rounded to float32, then to the output.

Codes lie in *slices*, most significant bits first: a file made in the order (4, 1, 1, 2) holds one slice of 4 bits, two
of 1, one of 2, and reading the first one, two, three or all of them gives 4, 5, 6 or 8 bits. A slice of width b holds
tiles of 512 elements in b vectors of 64 bytes: byte i of vector v holds, in its bits [j b, (j + 1) b), element
64 (v 8/b + j) + i of the tile. The last tile is filled up with zeros. Shift and mask, the same for every width.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch

from ssdtune.kernels.formats import Part, num_elements

TILE = 512  # elements
LANES = 64  # bytes of a vector
SLICE_WIDTHS = (1, 2, 4, 8)  # a slice's codes lie whole in a byte
GROUPS = (32, 64, 128)
# How a file is made by default for each widest reading.
ORDERS: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 1, 1),
    7: (4, 1, 2),
    8: (4, 1, 1, 2),
}
CHUNK = 1 << 20  # elements that torch's operators take at a time, a multiple of TILE


@dataclasses.dataclass(frozen=True, slots=True)
class Affine:
    """bits: read now; a sum of the first slices of `order`. group: elements that share a scale, one of GROUPS. is_nested:
    whether fewer bits than all can be read too."""

    bits: int
    order: tuple[int, ...]
    group: int = 64
    is_nested: bool = True

    def __post_init__(self) -> None:
        assert set(self.order) <= set(SLICE_WIDTHS), self.order
        assert self.bits in self.readings, (self.bits, self.order)
        assert self.group in GROUPS, self.group

    @property
    def label(self) -> str:
        """For messages and tables."""
        return f"affine, {self.bits} bit{'s' * (self.bits > 1)}, groups of {self.group}"

    @property
    def readings(self) -> tuple[int, ...]:
        """Widths that the file can be read at, ascending."""
        return tuple(widths(self.order)) if self.is_nested else (sum(self.order),)

    @property
    def slices(self) -> tuple[int, ...]:
        """Widths of the slices that are read."""
        return self.order[: widths(self.order).index(self.bits) + 1]

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Slices, most significant first; scales; zeros."""
        n = num_elements(shape)
        num_tiles, num_groups = -(-n // TILE), -(-n // self.group)
        codes = (
            Part(f"codes.{i}", "U8", (num_tiles * LANES * width,))
            for i, width in enumerate(self.slices)
        )
        return (
            *codes,
            Part(f"scales.{self.bits}", "BF16", (num_groups,)),
            Part(f"zeros.{self.bits}", "U8", (num_groups,)),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        flat = out.view(-1)
        for some, values in self.values(parts, flat.numel()):
            flat[some] = values

    def values(
        self, parts: Sequence[torch.Tensor], num_elements: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some elements at a time, whole tiles but for the last ones, and their values in float32."""
        *slices, scales, zeros = parts
        for first in range(0, num_elements, CHUNK):
            count = min(CHUNK, num_elements - first)
            tiles = slice(first // TILE, -(-(first + count) // TILE))
            codes = join_slices(
                [
                    s[tiles.start * LANES * w : tiles.stop * LANES * w]
                    for s, w in zip(slices, self.slices, strict=True)
                ],
                self.slices,
            )[:count]
            groups = slice(first // self.group, -(-(first + count) // self.group))
            scale = scales[groups].float().repeat_interleave(self.group)[:count]
            zero = zero_of(zeros[groups], self.bits).repeat_interleave(self.group)[:count]
            yield slice(first, first + count), (codes.float() - zero) * scale


def widths(order: Sequence[int]) -> list[int]:
    """Widths that slices in this order end at, ascending."""
    return list(itertools.accumulate(order))


def zero_of(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """z of the stored u, float32: exact."""
    return (zeros.float() + 0.5) * 2.0 ** (bits - 8) - 0.5


def pack_slice(codes: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 codes below 2^width, flat, to the bytes of a slice, uint8 [tiles * 64 * width]."""
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % TILE))
    fields = padded.view(-1, width, 8 // width, LANES)
    packed = torch.zeros_like(fields[:, :, 0])
    for j in range(8 // width):
        packed |= fields[:, :, j] << (j * width)
    return packed.reshape(-1)


def unpack_slice(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The codes of a slice, uint8, those that fill up the last tile too."""
    vectors = packed.view(-1, width, 1, LANES)
    shifts = torch.arange(8 // width, dtype=torch.uint8, device=packed.device) * width
    fields = (vectors >> shifts.view(1, 1, -1, 1)) & (2**width - 1)
    return fields.reshape(-1)


def split_codes(codes: torch.Tensor, order: Sequence[int]) -> list[torch.Tensor]:
    """Codes of sum(order) bits, uint8, flat, to slices' bytes, most significant bits first."""
    left = sum(order)
    made = []
    for width in order:
        left -= width
        made.append(pack_slice((codes >> left) & (2**width - 1), width))
    return made


def join_slices(slices: Sequence[torch.Tensor], order: Sequence[int]) -> torch.Tensor:
    """The codes that slices hold together, uint8."""
    codes = unpack_slice(slices[0], order[0])
    for packed, width in zip(slices[1:], order[1:], strict=True):
        codes = (codes << width) | unpack_slice(packed, width)
    return codes
