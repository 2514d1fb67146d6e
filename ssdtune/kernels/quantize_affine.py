"""Encoder: float weights to affine codes, read at one width or at several.

The unknowns of a group are two, scale and zero: a grid of ranges, each end of the group's own moved by fractions of a
step, is tried, then a few steps of alternating least squares are taken (nearest codes for this scale and zero, best scale
and zero for these codes: Lloyd, "Least squares quantization in PCM", 1982, with equidistant levels). Where files are read
at three bits only such zeros are tried as are next to whole numbers there, so that the value 0 has a code of its own, as
Jacob et al. (arXiv 1712.05877, 2.1) ask for: the few inputs that are by far the largest meet weights near 0, and a
fraction of such a wide step there costs more than the sixth that the squared error of all weights is larger for it; at
two bits and at four and more it costs less (`benchmarks/README.md`, "Packed weights").

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
from typing import NamedTuple

import torch

from ssdtune.kernels.affine import Affine, split_codes, widths
from ssdtune.kernels.formats import Format
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
from ssdtune.kernels.rotated import rotated

# Ranges that are tried: at each end one of so many, spaced evenly between the most that is added and the most that is
# cut, in steps of the widest reading. 49 or 81 pairs instead of 25 lower the error at 4 bits by less than 1 %.
NUM_CUTS = 5
MAX_CUT = 0.75
MIN_CUT = -0.25
FIRST_WEIGHT = 2.0  # of the first slice's width in the loss, where the others have 1
WHOLE_ZERO_BITS = 3  # read at so many, the value 0 has a code


def encoder_of(format: Format) -> int:
    """The number of such a file's encoder, raised whenever it makes other codes of the same weights: so a packing is not
    gone on with by another encoder than began it, nor taken for what this one would make. 2: whole zeros."""
    has_whole_zeros = isinstance(format, Affine) and WHOLE_ZERO_BITS in widths(format.order)
    return 2 if has_whole_zeros else 1


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

    return by_chunks(values, parts, CHUNK, encode)


def _affine_chunk(chunk: torch.Tensor, format: Affine, is_rotated: bool) -> dict[str, torch.Tensor]:
    """Parts of float32 values, flat, rotated already. format: read at all bits."""
    fitted = format.order if format.is_nested else (format.bits,)
    made = [_affine_groups(rows, fitted, is_rotated) for rows in in_rows(chunk, format.group)]
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
        x = values * power_of_two(-exponent).unsqueeze(1)
        mean = x.mean(1)
        # Of what is left without the mean: squares' mean less the mean's square would be noise where values are alike.
        deviation = torch.linalg.vector_norm(x - mean.unsqueeze(1), dim=1)
        return _Groups(x, power_of_two(exponent), mean, deviation.square_() / x.shape[1])

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
