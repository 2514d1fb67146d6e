"""Encoder: float weights to four bits by a table, with a scale for each block.

The unknown of a block is its scale: some are tried around the one that lets the largest magnitude meet the table's, then
a few steps of alternating least squares are taken, as `quantize_affine.py` does for scale and zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import torch

from ssdtune.kernels.nibbles import NVFP4_BLOCKS, SCALE_DTYPES, Nibbles, scale_of
from ssdtune.kernels.quantize import (
    CHUNK,
    LARGEST,
    NUM_REFITS,
    SMALLEST,
    TINY,
    by_chunks,
    in_rows,
    power_of_two,
)

# Scales that are tried for a table, in units of the block's largest magnitude / the table's.
FACTORS = (1.0, 0.7, 0.8, 0.87, 0.94, 1.07, 1.15, 1.3, 1.5)
UE5M3_LARGEST = 114_688  # code 254
NVFP4_LARGEST = 6 * 448  # E2M1's largest value times e4m3's
NVFP4_LEAST = SMALLEST * 2.0**9  # with the smallest e4m3 scale, 2^-9, still a normal number


def quantize_nibbles(
    values: torch.Tensor,
    table: tuple[float, ...],
    block: int,
    scale: str = "F32",
    *,
    is_high_first: bool = False,
    is_searched: bool = True,
) -> dict[str, torch.Tensor]:
    """The parts of `Nibbles(table, block, is_high_first, scale)`: codes and scales.

    values: as `quantize_affine` takes them. is_searched: whether scales are those of the least squared error among
    those tried; else each is the block's largest magnitude / the table's, rounded, as bitsandbytes has it, and for
    e8m0 2^(floor(log2(magnitude)) - 2), as OCP Microscaling 1.0, 6.3, has it for FP4. Codes are those of the nearest
    entries; halfway between two, the one of even index; of equal entries (0, -0) the first.
    e4m3 scales reach down to 2^-9 only: for smaller weights there is `quantize_nvfp4`. ue5m3 scales reach down to 2^-17.
    Raises ValueError, naming their number, where values are not finite."""
    format = Nibbles(table, block, is_high_first, scale)
    book = _Codebook.of(table, values.device)
    encode = partial(_nibble_chunk, format=format, book=book, is_searched=is_searched)
    return by_chunks(values, format.parts(tuple(values.shape)), _chunk_of(block), encode)


def quantize_nvfp4(values: torch.Tensor, num_stored: int = 1) -> dict[str, torch.Tensor]:
    """The parts of `Nvfp4(is_divided=False, num_stored)`: codes, scales, and the scale of the whole tensor, zeros behind.

    That one is the largest magnitude / (6 * 448), so that the block with that magnitude has the largest e4m3 scale
    (NVIDIA, arXiv 2509.25149), at least NVFP4_LEAST; values / it, rounded to float32, are then encoded as
    `quantize_nibbles` does. Blocks whose largest magnitude is below about a 500,000th of the tensor's become zeros.
    values, errors: as there."""
    book = _Codebook.of(NVFP4_BLOCKS.table, values.device)
    whole = _nvfp4_scale(values)

    def encode(chunk: torch.Tensor) -> dict[str, torch.Tensor]:
        return _nibble_chunk(chunk / whole, NVFP4_BLOCKS, book, is_searched=True)

    parts = NVFP4_BLOCKS.parts(tuple(values.shape))
    made = by_chunks(values, parts, _chunk_of(NVFP4_BLOCKS.block), encode)
    return {**made, "global_scale": torch.nn.functional.pad(whole.view(1), (0, num_stored - 1))}


def _nvfp4_scale(values: torch.Tensor) -> torch.Tensor:
    """Of the whole tensor, float32, no dimensions."""
    if not values.numel():
        return torch.ones((), device=values.device)
    least, most = torch.aminmax(values.detach())
    magnitude = torch.maximum(-least, most).float().clamp(max=LARGEST)
    return (magnitude / NVFP4_LARGEST).clamp(min=NVFP4_LEAST)


def _chunk_of(block: int) -> int:
    """Elements at a time, about CHUNK: whole blocks and whole bytes."""
    return CHUNK // (2 * block) * 2 * block


def _nibble_chunk(
    chunk: torch.Tensor, format: Nibbles, book: _Codebook, is_searched: bool
) -> dict[str, torch.Tensor]:
    """The parts of float32 values, flat."""
    rows = in_rows(chunk, format.block)
    made = [_nibble_blocks(some, book, format.scale, is_searched) for some in rows]
    codes = torch.cat([codes for codes, _ in made])
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    high, low = (0, 1) if format.is_high_first else (1, 0)
    packed = pairs[:, high] << 4 | pairs[:, low]
    return {"codes": packed, "scales": torch.cat([scales for _, scales in made])}


@dataclasses.dataclass(frozen=True, slots=True)
class _Codebook:
    """The different entries of a table in ascending order, and cells to find the nearest one by.

    Cells are of equal width, so narrow that at most one of the edges between two entries' ranges lies in each."""

    entries: torch.Tensor  # float32
    codes: torch.Tensor  # uint8: of the entries
    edges: torch.Tensor  # float32 [cells]: the cell's edge, infinite where it has none
    below: torch.Tensor  # int32 [cells]: number of edges in the cells before
    largest: float  # magnitude of an entry

    @staticmethod
    def of(table: Sequence[float], device: torch.device) -> _Codebook:
        """table: at least two different values."""
        ordered = sorted({value: table.index(value) for value in table}.items())
        entries = torch.tensor([value for value, _ in ordered])
        codes = torch.tensor([code for _, code in ordered], dtype=torch.uint8)
        edges = (entries[1:].double() + entries[:-1].double()).mul_(0.5).float()
        # What lies on an edge goes to the entry below it; so where that one is odd, the edge is moved a last bit down.
        edges = torch.where(codes[:-1] % 2 == 0, edges, edges.nextafter(torch.tensor(-math.inf)))
        largest, num_cells = float(entries.abs().max()), 32
        while len(_cells(edges, largest, num_cells).unique()) < len(edges):
            num_cells *= 2
            assert num_cells <= 1 << 16, table
        cells = _cells(edges, largest, num_cells)
        cell_edges = torch.full((num_cells,), math.inf).index_copy_(0, cells.long(), edges)
        has_edge = cell_edges.isfinite()
        below = (has_edge.cumsum(0) - has_edge.long()).int()
        return _Codebook(
            entries.to(device), codes.to(device), cell_edges.to(device), below.to(device), largest
        )

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Index in `entries` of the nearest one, int32, flat."""
        x = x.reshape(-1)
        cells = _cells(x, self.largest, len(self.edges))
        return self.below.index_select(0, cells).add_(x > self.edges.index_select(0, cells))


def _cells(x: torch.Tensor, largest: float, num_cells: int) -> torch.Tensor:
    """The cell that each value lies in, int32. Ascends with the value in float32 too: each operation does."""
    scaled = x * (num_cells / (2 * largest))
    return scaled.add_(num_cells / 2).clamp_(0, num_cells - 1).int()


def _nibble_blocks(
    x: torch.Tensor, book: _Codebook, kind: str, is_searched: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8, flat, and scales as they are stored. x: float32 [blocks, elements]."""
    tried = [_as_stored(scale, kind) for scale in _scales(x, book, kind)]
    best = _best_scale(x, book, kind, tried) if is_searched else tried[0]
    return book.codes.index_select(0, _nearest(x, book, best)), _stored(best, kind)


def _scales(x: torch.Tensor, book: _Codebook, kind: str) -> list[torch.Tensor]:
    """Scales to try for each block, float32 [blocks]: the usual ones first."""
    most = x.abs().amax(1)
    if kind == "E8M0":
        usual = torch.frexp(most).exponent - 1 - math.floor(math.log2(book.largest))
        return [power_of_two((usual + more).clamp(-126, 127)) for more in (0, 1)]
    return [most * (factor / book.largest) for factor in FACTORS]


def _best_scale(
    x: torch.Tensor, book: _Codebook, kind: str, tried: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The scale of least squared error of these and of those that fit their codes best; the first ones where equal."""
    best, (least, fitted) = tried[0], _scale_loss(x, book, tried[0])
    for number in range(1, len(tried) + NUM_REFITS):
        scale = tried[number] if number < len(tried) else _as_stored(fitted, kind)
        loss, refitted = _scale_loss(x, book, scale)
        is_better = loss < least
        best, least = torch.where(is_better, scale, best), torch.where(is_better, loss, least)
        fitted = torch.where(is_better, refitted, fitted)
    return best


def _scale_loss(
    x: torch.Tensor, book: _Codebook, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Root of the squared error with this scale, and the scale that fits its codes best: [blocks]."""
    entries = book.entries.index_select(0, _nearest(x, book, scale)).view(x.shape)
    square = torch.linalg.vector_norm(entries, dim=1).square_().clamp_(min=TINY)
    fitted = (entries * x).sum(1) / square
    error = entries.mul_(scale.unsqueeze(1)).sub_(x)
    return torch.linalg.vector_norm(error, dim=1), fitted


def _nearest(x: torch.Tensor, book: _Codebook, scale: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry, flat; without a scale, that of 0."""
    return book.nearest(x / torch.where(scale > 0, scale, math.inf).unsqueeze(1))


def _as_stored(scale: torch.Tensor, kind: str) -> torch.Tensor:
    """The scale that is read back, float32."""
    return scale_of(_stored(scale, kind), kind)


def _stored(scale: torch.Tensor, kind: str) -> torch.Tensor:
    """Scales in the file's dtype, the nearest there is; for e8m0 the power of two at or below."""
    if kind == "E8M0":
        return (torch.frexp(scale).exponent + 126).clamp(0, 254).to(torch.uint8)
    if kind == "UE5M3":
        return _ue5m3(scale)
    dtype = SCALE_DTYPES[kind]
    return scale.clamp(max=torch.finfo(dtype).max).to(dtype)


def _ue5m3(scale: torch.Tensor) -> torch.Tensor:
    """The nearest there is, ties to even, at most 114,688: uint8. scale: not negative."""
    bits = scale.clamp(max=float(UE5M3_LARGEST)).view(torch.int32)
    normal = (bits + 0x7FFFF + (bits >> 20 & 1) >> 20) - (127 - 15 << 3)
    small = (scale * 2.0**17).round().to(torch.int32)  # 8 is where normal numbers begin
    return torch.where(scale < 2.0**-14, small, normal).to(torch.uint8)
