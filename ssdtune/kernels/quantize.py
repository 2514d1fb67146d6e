"""Encoders: float weights to the packed formats, by the weights alone, with no calibration data.

Both minimise the squared error of each group. For affine codes the unknowns are two, scale and zero: a grid of ranges,
each end of the group's own moved by fractions of a step, is tried, then a few steps of alternating least squares are
taken (nearest codes for this scale and zero, best scale and zero for these codes: Lloyd, "Least squares quantization in
PCM", 1982, with equidistant levels). Where files are read at three bits only such zeros are tried as are next to whole
numbers there, so that the value 0 has a code of its own, as Jacob et al. (arXiv 1712.05877, 2.1) ask for: the few inputs
that are by far the largest meet weights near 0, and a fraction of such a wide step there costs more than the sixth that
the squared error of all weights is larger for it; at two bits and at four and more it costs less (`benchmarks/README.md`,
"Packed weights"). For four-bit tables the unknown is the scale, found alike. Codes are always the nearest ones for scale
and zero *as stored*.

Codes that are read at several widths are made for all of them: the loss is the sum of the errors' logarithms, the first
width counted twice since it has the most to lose. A wider range costs the widest reading little (a step is 1/255 of it)
and lets the edges of the first slice's 16 cells come to lie well. Scale and zero of the narrower readings are then
fitted to what is left of the codes.

Half-quadratic splitting (HQQ, Badri & Shaji 2023) moves the zero alone, and so that a few errors may be large. At equal
bits a weight its squared error is larger at every width (`benchmarks/quality.py`, on MiniLM); with the same groups so is
the error of MiniLM's hidden states at 2 and 4 bits (2026-11-28; at 3 bits not compared since zeros are whole there).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ssdtune.kernels.affine import Affine, split_codes, widths
from ssdtune.kernels.apart import in_order
from ssdtune.kernels.formats import Format, Part
from ssdtune.kernels.nibbles import NVFP4_BLOCKS, SCALE_DTYPES, Nibbles, scale_of
from ssdtune.kernels.rotated import rotated

# Elements at a time: a temporary takes 2 MB, all of them less than 32 MB on each thread. With half of it calls take a
# tenth of the time, with twice as much the second cache is too small (2026-11-29).
CHUNK = 1 << 19
DTYPES = {"U8": torch.uint8, **SCALE_DTYPES}
# Ranges that are tried: at each end one of so many, spaced evenly between the most that is added and the most that is
# cut, in steps of the widest reading. 49 or 81 pairs instead of 25 lower the error at 4 bits by less than 1 %.
NUM_CUTS = 5
MAX_CUT = 0.75
MIN_CUT = -0.25
FIRST_WEIGHT = 2.0  # of the first slice's width in the loss, where the others have 1
NUM_REFITS = 2
WHOLE_ZERO_BITS = 3  # read at so many, the value 0 has a code
# Scales that are tried for a table, in units of the block's largest magnitude / the table's.
FACTORS = (1.0, 0.7, 0.8, 0.87, 0.94, 1.07, 1.15, 1.3, 1.5)
SMALLEST = 2.0**-126  # normal bfloat16 number; some processors take what is smaller for 0
LARGEST = 0.99 * torch.finfo(torch.bfloat16).max  # a decoded value may be; less what rounding adds
UE5M3_LARGEST = 114_688  # code 254
NVFP4_LARGEST = 6 * 448  # E2M1's largest value times e4m3's
NVFP4_LEAST = SMALLEST * 2.0**9  # with the smallest e4m3 scale, 2^-9, still a normal number
TINY = 1e-30  # where it takes part, a sum of squares of numbers near 1 is zero


def encoder_of(format: Format) -> int:
    """The number of such a file's encoder, raised whenever it makes other codes of the same weights: so a packing is not
    gone on with by another encoder than began it, nor taken for what this one would make. 2: whole zeros."""
    has_whole_zeros = isinstance(format, Affine) and WHOLE_ZERO_BITS in widths(format.order)
    return 2 if has_whole_zeros else 1


# -------------------------------------------------------------------------------- affine codes


def quantize_affine(
    values: torch.Tensor,
    bits_order: tuple[int, ...],
    group: int = 64,
    *,
    is_nested: bool = True,
    is_rotated: bool = False,
) -> dict[str, torch.Tensor]:
    """All parts of a file of `Affine(..., bits_order, group, is_nested)`, by suffix: every slice, scales and zeros of
    every width that can be read.

    values: any shape and floating dtype, on any device, taken as float32; where not contiguous, copied whole. At least
    as good as rounding to nearest on the range from least to largest value, where there is one width; on such a range
    with a whole zero where that is WHOLE_ZERO_BITS. Values of a group are kept within the range that has 0
    in it: one of equal values far from 0 has few codes in use. A group whose scale would be below 2^-126 becomes zeros,
    and no finite value becomes infinite. is_rotated: for `Rotated`; values are then below 10^36. Raises ValueError,
    naming their number, where values are not finite."""
    format = Affine(sum(bits_order), bits_order, group, is_nested)
    readings = [dataclasses.replace(format, bits=width) for width in format.readings]
    parts = [part for reading in readings for part in reading.parts(tuple(values.shape))]

    def encode(chunk: torch.Tensor) -> dict[str, torch.Tensor]:
        return _affine_chunk(rotated(chunk, group) if is_rotated else chunk, format, is_rotated)

    return _by_chunks(values, parts, CHUNK, encode)


def _affine_chunk(chunk: torch.Tensor, format: Affine, is_rotated: bool) -> dict[str, torch.Tensor]:
    """Parts of float32 values, flat, rotated already. format: read at all bits."""
    fitted = format.order if format.is_nested else (format.bits,)
    made = [_affine_groups(rows, fitted, is_rotated) for rows in _rows(chunk, format.group)]
    codes = torch.cat([codes.view(-1) for codes, _ in made])
    found = {f"codes.{i}": packed for i, packed in enumerate(split_codes(codes, format.order))}
    for width in format.readings:
        found[f"scales.{width}"] = torch.cat([grids[width][0] for _, grids in made])
        found[f"zeros.{width}"] = torch.cat([grids[width][1] for _, grids in made])
    return found


class _Grid(NamedTuple):
    """Values that codes can stand for, (q - zero) * scale: float32 [groups], both as they are stored."""

    scale: torch.Tensor
    zero: torch.Tensor


class _Zeros(NamedTuple):
    """Zeros that are tried, of those that can be stored for codes of so many bits: all, or the nearest ones to such as
    are whole numbers for the first `whole_bits` of them, so that read at these the value 0 has a code of its own (but for
    1/64 of a step at 3 bits)."""

    bits: int
    whole_bits: int | None = None

    def nearest(self, zero: torch.Tensor) -> torch.Tensor:
        """Of those tried, as they are stored, the nearest to `zero`: float32."""
        if self.whole_bits is not None:
            cell = 2.0 ** (self.bits - self.whole_bits)  # codes with the same first bits
            first = ((zero + 0.5) / cell - 0.5).round().clamp(0, 2**self.whole_bits - 1)
            zero = (first + 0.5) * cell - 0.5
        return (_zero_code(zero, self.bits) + 0.5) * 2.0 ** (self.bits - 8) - 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class _Groups:
    """Groups to be encoded, each divided by a power of two so that squares neither vanish nor overflow."""

    x: torch.Tensor  # float32 [groups, elements], magnitudes up to about 1
    unit: torch.Tensor  # float32 [groups]: what x is in units of
    mean: torch.Tensor  # [groups]
    variance: torch.Tensor  # [groups]

    @staticmethod
    def of(values: torch.Tensor) -> _Groups:
        """values: float32 [groups, elements], finite."""
        exponent = torch.frexp(values.abs().amax(1)).exponent.clamp(-126, 126)
        x = values * _power_of_two(-exponent).unsqueeze(1)
        mean = x.mean(1)
        # Of what is left without the mean: squares' mean less the mean's square would be noise where values are alike.
        deviation = torch.linalg.vector_norm(x - mean.unsqueeze(1), dim=1)
        return _Groups(x, _power_of_two(exponent), mean, deviation.square_() / x.shape[1])

    def stored(self, grid: _Grid, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """bfloat16 scales and uint8 zeros, [groups]."""
        scale = grid.scale * self.unit
        scale = torch.where(scale < SMALLEST, 0.0, scale).bfloat16()
        return scale, _zero_code(grid.zero, bits).to(torch.uint8)


def _affine_groups(
    values: torch.Tensor, order: tuple[int, ...], is_rotated: bool
) -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Codes of the widest reading, uint8 [groups, elements], and what is stored for each width."""
    groups = _Groups.of(values)
    bits = sum(order)
    # 0 is nothing special in rotated groups.
    has_code_of_0 = WHOLE_ZERO_BITS in widths(order) and not is_rotated
    grid = _search(groups, order, _Zeros(bits, WHOLE_ZERO_BITS if has_code_of_0 else None))
    codes = _codes(groups, grid, bits)
    found = {bits: groups.stored(grid, bits)}
    for width in widths(order)[:-1]:
        midpoints = grid.scale * 2.0 ** (bits - width)
        fitted = _fit(groups, _prefix(codes, bits - width), _Zeros(width), midpoints)
        found[width] = groups.stored(fitted, width)
    return codes.to(torch.uint8), found


def _search(groups: _Groups, order: tuple[int, ...], zeros: _Zeros) -> _Grid:
    """The best grid found for the widest reading."""
    best, *others = _starts(groups, order, zeros)
    least = _loss(groups, best, order)
    for start in others:
        best, least = _better(groups, order, best, least, start)
    for _ in range(NUM_REFITS):
        fitted = _fit(groups, _codes(groups, best, zeros.bits), zeros, best.scale)
        best, least = _better(groups, order, best, least, fitted)
    return best


def _cuts(order: tuple[int, ...]) -> list[float]:
    """Steps of the widest reading that are cut from an end of the range; negative: added to it."""
    num_steps = 2 ** sum(order) - 1
    first_step = num_steps / (2 ** order[0] - 1)
    # With one step, two large cuts would leave nothing.
    most, least = min(MAX_CUT, 0.4 * num_steps), MIN_CUT - (first_step - 1) / 2
    return torch.linspace(least, most, NUM_CUTS).tolist()


def _better(
    groups: _Groups, order: tuple[int, ...], best: _Grid, least: torch.Tensor, tried: _Grid
) -> tuple[_Grid, torch.Tensor]:
    """Of two grids the better one for each group, and its loss."""
    loss = _loss(groups, tried, order)
    is_better = loss < least
    scale, zero = (torch.where(is_better, new, old) for new, old in zip(tried, best, strict=True))
    return _Grid(scale, zero), torch.where(is_better, loss, least)


def _starts(groups: _Groups, order: tuple[int, ...], zeros: _Zeros) -> list[_Grid]:
    """Grids over each group's range with 0 in it: on the whole of it first, then less cuts at its ends."""
    cuts = _cuts(order)
    pairs = [(0.0, 0.0), *itertools.product(cuts, cuts)]
    cut_low, cut_high = torch.tensor(pairs, device=groups.x.device).t().unsqueeze(2)
    low, high = groups.x.amin(1).clamp(max=0), groups.x.amax(1).clamp(min=0)
    num_steps = 2**zeros.bits - 1
    step = (high - low) / num_steps
    scale = step * (1 - (cut_low + cut_high) / num_steps)
    grids = _grid(groups, zeros, scale, torch.zeros_like(scale), low + cut_low * step)
    return [_Grid(*pair) for pair in zip(*grids, strict=True)]


def _grid(
    groups: _Groups, zeros: _Zeros, scale: torch.Tensor, code: torch.Tensor, value: torch.Tensor
) -> _Grid:
    """The grid that is allowed nearest to the one of this scale on which `code` stands for `value`."""
    scale = scale.bfloat16().float()
    return _stored_grid(groups, zeros, scale, zeros.nearest(code - value / scale.clamp(min=TINY)))


def _stored_grid(groups: _Groups, zeros: _Zeros, scale: torch.Tensor, zero: torch.Tensor) -> _Grid:
    """The grid of this zero, which is allowed, with the scale as it can be stored and makes nothing infinite."""
    farthest = torch.maximum(zero, 2**zeros.bits - 1 - zero).clamp(min=1)
    limit = LARGEST / groups.unit / farthest
    return _Grid(torch.minimum(scale, limit).bfloat16().float(), zero)


def _zero_code(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The u of affine.py's docstring that is nearest to it, float32."""
    return ((zero + 0.5) * 2.0 ** (8 - bits) - 0.5).round().clamp(0, 255)


def _steps(groups: _Groups, grid: _Grid) -> torch.Tensor:
    """Where the values lie among codes, before rounding."""
    inverse = torch.where(grid.scale > 0, 1 / grid.scale, 0.0)
    return (groups.x * inverse.unsqueeze(1)).add_(grid.zero.unsqueeze(1))


def _codes(groups: _Groups, grid: _Grid, bits: int) -> torch.Tensor:
    """The nearest codes, as float32."""
    return _steps(groups, grid).round_().clamp_(0, 2**bits - 1)


def _prefix(codes: torch.Tensor, num_cut: int) -> torch.Tensor:
    """Codes without their last bits."""
    return (codes * 2.0**-num_cut).floor_()


def _loss(groups: _Groups, grid: _Grid, order: tuple[int, ...]) -> torch.Tensor:
    """Sum of the logarithms of mean squared errors, [groups]: of the widest reading on this grid, of the narrower ones
    with scale and zero of their own as least squares would have them."""
    bits = sum(order)
    steps = _steps(groups, grid)
    codes = steps.round().clamp_(0, 2**bits - 1)
    error = torch.linalg.vector_norm(steps.sub_(codes), dim=1).mul_(grid.scale)
    loss = (error.square_() / codes.shape[1]).clamp_(min=TINY).log_()
    for i, width in enumerate(widths(order)[:-1]):
        _, variance, covariance = _moments(groups, _prefix(codes, bits - width))
        left = groups.variance - covariance.square() / variance.clamp(min=TINY)
        loss += left.clamp_(min=TINY).log_() * (1.0 if i else FIRST_WEIGHT)
    return loss


def _moments(
    groups: _Groups, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and variance of codes, their covariance with the values: [groups]. Uses up `codes`."""
    n = codes.shape[1]
    mean = codes.sum(1) / n
    # Sums of up to 128 squares of 8 bits are whole numbers below 2^24.
    variance = torch.linalg.vector_norm(codes, dim=1).square_() / n - mean.square()
    covariance = codes.mul_(groups.x).sum(1) / n - mean * groups.mean
    return mean, variance.clamp_(min=0), covariance


def _fit(groups: _Groups, codes: torch.Tensor, zeros: _Zeros, fallback: torch.Tensor) -> _Grid:
    """The grid that is allowed and fits these codes best, by least squares; uses up `codes`.

    Neighbours of the rounded scale were tried and change the error's sixth digit.
    fallback: scales, [groups], where all codes of a group are the same."""
    mean, variance, covariance = _moments(groups, codes)
    slope = torch.where(variance > 0, covariance / variance.clamp(min=TINY), fallback)
    _, zero = _grid(groups, zeros, slope, mean, groups.mean)
    # The best scale for the zero as it was rounded.
    away = mean - zero
    scale = (covariance + groups.mean * away) / (variance + away.square()).clamp(min=TINY)
    return _stored_grid(groups, zeros, scale.clamp(min=0), zero)


# ------------------------------------------------------------------------- four bits by a table


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
    return _by_chunks(values, format.parts(tuple(values.shape)), _chunk_of(block), encode)


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
    made = _by_chunks(values, parts, _chunk_of(NVFP4_BLOCKS.block), encode)
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
    rows = _rows(chunk, format.block)
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
        return [_power_of_two((usual + more).clamp(-126, 127)) for more in (0, 1)]
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


# ----------------------------------------------------------------------------------------- both


def decoded(
    format: Format, made: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> torch.Tensor:
    """What the parts that an encoder made stand for, float32 of that shape, by the definition."""
    out = torch.empty(shape)
    format.by_torch([made[part.suffix] for part in format.parts(shape)], out)
    return out


def _by_chunks(
    values: torch.Tensor,
    parts: Iterable[Part],
    chunk: int,
    encode: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The parts of all values, made of those that `encode` makes of so many of them at a time."""
    flat = values.detach().reshape(-1)
    refuse_what_is_no_number(flat)
    made = {
        part.suffix: torch.empty(part.shape, dtype=DTYPES[part.dtype], device=flat.device)
        for part in parts
    }
    ends = dict.fromkeys(made, 0)
    pieces = _pieces(flat, chunk)
    for found in in_order(lambda piece: encode(piece.float()), pieces, flat.device):
        for suffix, part in found.items():
            made[suffix][ends[suffix] : ends[suffix] + part.numel()] = part
            ends[suffix] += part.numel()
    return made


def _rows(flat: torch.Tensor, size: int) -> list[torch.Tensor]:
    """[rows, size] and, where something is left, [1, rest]."""
    whole = flat.numel() // size * size
    parts = (flat[:whole].view(-1, size), flat[whole:].view(1, -1))
    return [part for part in parts if part.numel()]


def refuse_what_is_no_number(flat: torch.Tensor) -> None:
    """Raises ValueError that names their number. flat: of one dimension, any size."""
    bad = sum(in_order(_num_infinite, _pieces(flat, CHUNK), flat.device))
    if bad:
        raise ValueError(f"{bad:,} of {flat.numel():,} values are not finite numbers in float32.")


def _num_infinite(piece: torch.Tensor) -> int:
    """How many values are not finite in float32."""
    values = piece.float()
    ends = torch.stack(torch.aminmax(values))  # NaN where one of the values is
    # Looking at all of them takes ten times as long.
    return 0 if bool(ends.isfinite().all()) else int((~values.isfinite()).sum())


def _pieces(flat: torch.Tensor, size: int) -> Sequence[torch.Tensor]:
    """Of so many elements, the last of what is left; none of nothing."""
    return flat.split(size) if flat.numel() else ()


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent, float32, exact. exponent: int32, -126 to 127."""
    return (exponent + 127 << 23).view(torch.float32)
