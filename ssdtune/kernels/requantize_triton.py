"""Codes moved and rounded at random on a GPU: the Triton twin of requantize.py, which defines every bit of it.

What weights are moved by is made in float32, CHUNK elements at a time, by the kernels that decode and that add noise. A
program then takes TILES tiles of 512 elements: reads their slices, moves the codes of all eight vectors, and writes the
slices' bytes, each of which only it has read. (Nothing has run on a GPU yet.)
"""

# Kernels are in Triton's language, which looks like Python and has other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ssdtune.kernels.affine import LANES, TILE, Affine
from ssdtune.kernels.noise_triton import CHUNK, _float_of, _halves, _launch_add, _words
from ssdtune.kernels.unpack import TRITON, unpack
from ssdtune.kernels.unpack_add import Move
from ssdtune.kernels.unpack_triton import _affine_bytes, _field

TILES = 8  # of one program
KEYS = ("k0", "k1")  # new in every step: no kernel is compiled anew for their values


@triton.jit
def _moved(code, by, scale, word, LARGEST: tl.constexpr):
    """The code, uint32, moved by so much, float32, and rounded by the upper 24 bits of a word."""
    u = (word >> 8).to(tl.int32).to(tl.float32) * 2.0**-24
    moved = tl.div_rn(by, scale) + u
    moved = tl.where(moved != moved, 0.0, moved)
    moved = tl.where(moved > 1024.0, 1024.0, tl.where(moved < -1024.0, -1024.0, moved))
    whole = moved.to(tl.int32)  # toward zero
    whole = whole - (whole.to(tl.float32) > moved).to(tl.int32)
    to = code.to(tl.int32) + whole
    return tl.where(to < 0, 0, tl.where(to > LARGEST, LARGEST, to)).to(tl.uint32)


@triton.jit
def _code(read, VECTOR: tl.constexpr, WIDTHS: tl.constexpr):
    """The codes of a tile's vector, uint32."""
    code = tl.full((1, 1), 0, tl.uint32)
    for i in tl.static_range(len(WIDTHS)):
        code = (code << WIDTHS[i]) | _field(read[i], VECTOR, WIDTHS[i])
    return code


@triton.jit
def _byte(codes, VECTOR: tl.constexpr, WIDTH: tl.constexpr, BELOW: tl.constexpr):
    """A slice's vector of bytes, from the codes of all eight vectors of a tile."""
    FIELDS: tl.constexpr = 8 // WIDTH
    byte = tl.full((1, 1), 0, tl.uint32)
    for j in tl.static_range(FIELDS):
        found = (codes[VECTOR * FIELDS + j] >> BELOW) & (2**WIDTH - 1)
        byte = byte | (found << (j * WIDTH))
    return byte


@triton.jit(do_not_specialize=KEYS)
def _requantize(
    slices, scales, by, num_elements, first, k0, k1,
    BITS: tl.constexpr, WIDTHS: tl.constexpr, BELOW: tl.constexpr, GROUP: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """first: number of the first element in its tensor, a multiple of a tile."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)[:, None]
    lane = tl.arange(0, 64)[None, :]
    is_there = (tile * 512 < num_elements) & (lane >= 0)
    read = _affine_bytes(slices, 0, tile, lane, is_there, WIDTHS)
    counter = first // 4 + tile.to(tl.int64) * 128 + lane
    low = _words(counter, 2, k0.to(tl.uint32), k1.to(tl.uint32))
    high = _words(counter + 64, 2, k0.to(tl.uint32), k1.to(tl.uint32))
    codes = ()
    for v in tl.static_range(8):
        element = tile * 512 + v * 64 + lane
        inside = element < num_elements
        scale = _float_of(tl.load(scales + element // GROUP, mask=inside))
        moves = tl.load(by + element, mask=inside)
        code = _code(read, v, WIDTHS)
        word = low[v % 4] if v < 4 else high[v % 4]
        moved = tl.where(inside, _moved(code, moves, scale, word, 2**BITS - 1), code)
        codes = codes + (moved,)  # noqa: RUF005
    for i in tl.static_range(len(WIDTHS)):
        for v in tl.static_range(WIDTHS[i]):
            at = tile * (64 * WIDTHS[i]) + v * 64 + lane
            made = _byte(codes, v, WIDTHS[i], BELOW[i])
            tl.store(slices[i] + at, made.to(tl.uint8), mask=is_there)


def by_triton(format: Affine, parts: Sequence[torch.Tensor], num_elements: int, move: Move) -> None:
    """`requantize.requantize`, in place."""
    assert move.rounding_key is not None
    *slices, scales, zeros = parts
    below = [format.bits - sum(format.slices[: i + 1]) for i in range(len(format.slices))]
    for first in range(0, num_elements, CHUNK):
        count = min(CHUNK, num_elements - first)
        tiles = slice(first // TILE, -(-(first + count) // TILE))
        groups = slice(first // format.group, -(-(first + count) // format.group))
        some = [
            packed[tiles.start * LANES * width : tiles.stop * LANES * width]
            for packed, width in zip(slices, format.slices, strict=True)
        ]
        by = torch.empty(count, device=scales.device)
        unpack(format, (*some, scales[groups], zeros[groups]), by, suffix=TRITON)
        _make_moves(by, move, first)
        _requantize[(-(-(tiles.stop - tiles.start) // TILES),)](
            tuple(some),
            scales[groups].view(torch.int16),
            by,
            count,
            first,
            *_halves(move.rounding_key),
            BITS=format.bits,
            WIDTHS=format.slices,
            BELOW=tuple(below),
            GROUP=format.group,
            TILES=TILES,
            enable_fp_fusion=False,
        )


def _make_moves(weights: torch.Tensor, move: Move, first: int) -> None:
    """weights, float32, become what they are moved by."""
    decay = move.decay - 1
    if not move.directions:
        weights.mul_(torch.tensor(decay, dtype=torch.float32, device=weights.device))
    for direction in move.directions:
        _launch_add(weights, weights, direction, first, decay)
        decay = 1.0
