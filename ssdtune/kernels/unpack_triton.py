"""Packed tensors decoded on a GPU: the Triton twin of what affine.py and nibbles.py define, bit for bit.

A program takes tiles of 512 elements, eight vectors of 64; its *rows* are stretches of at most 64 lanes that share a
scale, so that scales are loaded once a row. What a tile needs is loaded before anything is stored. A slice's byte is
loaded once for all its fields, a byte of two nibbles by the one thread that stores both elements, which are neighbours.
Each of 128 threads stores 16 bytes at a time, neighbours side by side (8 bytes where a warp has 64 threads).

Any part may begin at any multiple of its dtype's size, codes at any byte, and is read right. Where slices and output
begin on 16 bytes and the number of elements is a multiple of 16, the compiler knows it from the arguments and joins a
thread's neighbours into one access; elsewhere they are taken one by one.

Compiled for sm_90 that is 15 instructions for an affine weight of 4 bits, 24 for one of 8, 16 for a nibble, rounded to
bfloat16; no shared memory, no barrier. (Triton 3.9. Nothing has run on a GPU yet.)

No sum, product or rounding to bfloat16 is left to a compiler (launched with enable_fp_fusion=False). Conversion to float16
is, which devices do to nearest. What is no number is 0x7FC0 in bfloat16, and some NaN in other dtypes.
"""

# Kernels are in Triton's language, which looks like Python and has other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ssdtune.kernels import noise, philox
from ssdtune.kernels.affine import LANES, TILE, Affine
from ssdtune.kernels.formats import Format
from ssdtune.kernels.nibbles import NVFP4_BLOCKS, NestedNibbles, Nibbles, Nvfp4
from ssdtune.kernels.noise import FIELD_BITS, Direction, add_directions, table_on
from ssdtune.kernels.noise_triton import _float_of, _nearest, _words

WARPS = 4
# Of one program: 16 bytes a thread and vector.
TILES = {torch.float32: 8, torch.bfloat16: 16, torch.float16: 16}
# Halves of keys, which are new in every step: no kernel is compiled anew for their values.
KEYS = ("low0", "high0", "low1", "high1")
MOST = 4  # tiles of 512 elements that a program takes one after the other


# ------------------------------------------------------------------ affine


@triton.jit
def _slice_bytes(packed, first_tile, tile, lane, is_there, WIDTH: tl.constexpr):
    """Of one tile in each row, the vectors of a slice: a tuple, each uint8 [rows, lanes]."""
    vectors = ()
    for v in tl.static_range(WIDTH):
        at = tile * (64 * WIDTH) + v * 64 + lane
        vectors = vectors + (tl.load(packed + first_tile * (64 * WIDTH) + at, mask=is_there),)  # noqa: RUF005
    return vectors


@triton.jit
def _affine_bytes(slices, first_tile, tile, lane, is_there, WIDTHS: tl.constexpr):
    """The vectors of each slice: a tuple of tuples."""
    read = ()
    for i in tl.static_range(len(WIDTHS)):
        vectors = _slice_bytes(slices[i], first_tile, tile, lane, is_there, WIDTHS[i])
        read = read + (vectors,)  # noqa: RUF005
    return read


@triton.jit
def _field(vectors, VECTOR: tl.constexpr, WIDTH: tl.constexpr):
    """What a slice has of the codes of a tile's vector of 64 elements, uint32 [rows, lanes]."""
    FIELDS: tl.constexpr = 8 // WIDTH
    return (vectors[VECTOR // FIELDS].to(tl.uint32) >> (VECTOR % FIELDS * WIDTH)) & (2**WIDTH - 1)


@triton.jit
def _scale_and_zero(scales, zeros, group, is_there, BITS: tl.constexpr):
    """Of groups: s, and 2^15 + z, both float32."""
    STEP: tl.constexpr = 2.0 ** (BITS - 8)
    scale = _float_of(tl.load(scales + group, mask=is_there))
    zero = (tl.load(zeros + group, mask=is_there).to(tl.float32) + 0.5) * STEP - 0.5
    return scale, zero + 32768.0


@triton.jit
def _dequantized(code, scale, zero):
    """(q - z) s, float32. code: q, uint32; zero: 2^15 + z."""
    # These are the bits of 2^15 + q. It and 2^15 + z are multiples of 2^-8 below 2^16, so both are exact in float32,
    # and so is their difference: an addition instead of a conversion, which devices do more slowly.
    raised = ((code << 8) | 0x47000000).to(tl.float32, bitcast=True)
    return (raised - zero) * scale


@triton.jit
def _affine_values(
    read, scales, zeros, first_tile, start, left,
    VECTOR: tl.constexpr, BITS: tl.constexpr, WIDTHS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(q - z) s of a tile's vector, float32 [rows, lanes]. start: each row's first element after those of first_tile."""
    group = first_tile * (512 // GROUP) + start // GROUP
    scale, zero = _scale_and_zero(scales, zeros, group, start < left, BITS)
    code = tl.full((1, 1), 0, tl.uint32)
    for i in tl.static_range(len(WIDTHS)):
        code = (code << WIDTHS[i]) | _field(read[i], VECTOR, WIDTHS[i])
    return _dequantized(code, scale, zero)


# ------------------------------------------------------------------ nibbles


@triton.jit
def _e4m3(byte):
    """e4m3's numbers as float32; 127 and 255 are none."""
    bits = byte.to(tl.uint32)
    size = bits & 0x7F
    small = size.to(tl.float32) * 2.0**-9
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    size = tl.where(size < 8, small, normal).to(tl.uint32, bitcast=True)
    size = tl.where((bits & 0x7F) == 0x7F, 0x7FC00000, size)
    return (size | (bits >> 7 << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _scale(scales, offset, at, is_there, KIND: tl.constexpr, NESTED: tl.constexpr):
    """Scales as float32, as `nibbles.scale_of`, `NestedNibbles` and `Nvfp4`. scales: parts that they are made from."""
    found = tl.load(scales[0] + at, mask=is_there)
    if KIND == "BF16":
        found = _float_of(found)
    elif KIND == "F16":
        found = found.to(tl.float32)
    elif KIND == "F8_E4M3":
        found = _e4m3(found)
    elif KIND == "e4m3 times one":
        found = _e4m3(found) * tl.load(scales[1])
    elif KIND == "e4m3 by one":
        found = tl.div_rn(_e4m3(found), tl.load(scales[1]))
    elif KIND == "nested":
        nested = tl.load(scales[2] + at // NESTED, mask=is_there)
        found = tl.load(scales[1] + found.to(tl.int32), mask=is_there) * nested + offset
    elif KIND == "UE5M3":
        bits = found.to(tl.uint32)
        normal = ((bits << 20) + (112 << 23)).to(tl.float32, bitcast=True)
        found = tl.where(bits < 8, bits.to(tl.float32) * 2.0**-17, normal)
        found = tl.where(bits == 255, float("nan"), found)
    elif KIND == "E8M0":
        bits = found.to(tl.uint32)
        bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
        found = bits.to(tl.float32, bitcast=True)
    return found


@triton.jit
def _nibble_bytes(codes, first, element, left):
    """Of the 8 vectors of one tile in each row: a tuple, each uint8 [rows, lanes]: every byte for both its elements."""
    read = ()
    for v in tl.static_range(8):
        at = element + v * 64
        read = read + (tl.load(codes + first // 2 + at // 2, mask=at < left),)  # noqa: RUF005
    return read


@triton.jit
def _nibble_values(
    byte, lane, scales, offset, table, first, start, left,
    HIGH_FIRST: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """table[q] scale of the elements of a tile's vector, float32 [rows, lanes]. start: as for `_affine_values`."""
    scale = _scale(scales, offset, (first + start) // BLOCK, start < left, KIND, NESTED)
    shift = (lane + HIGH_FIRST) % 2 * 4
    code = (byte.to(tl.int32) >> shift) & 15
    return tl.load(table + code) * scale


# ------------------------------------------------------------------ kernels


@triton.jit
def _lanes(TILES: tl.constexpr, SPAN: tl.constexpr):
    """Rows of SPAN lanes, 64 lanes a tile: the tile [rows, 1], the first lane [rows, 1], the lanes [rows, SPAN]."""
    row = tl.arange(0, TILES * (64 // SPAN))[:, None]
    first = row % (64 // SPAN) * SPAN
    return row // (64 // SPAN), first, first + tl.arange(0, SPAN)[None, :]


@triton.jit
def _store(to, value, is_there):
    """float32 values, rounded to nearest as the output wants them: bfloat16 where it is int16."""
    if to.dtype.element_ty == tl.int16:
        tl.store(to, _nearest(value), mask=is_there)
    else:
        tl.store(to, value.to(to.dtype.element_ty), mask=is_there)


@triton.jit
def _noise_words(keys, counter, NUM: tl.constexpr):
    """Of each of NUM directions the four words of each lane's counter, uint32 [rows, lanes]."""
    words = ()
    for d in tl.static_range(NUM):
        low, high = keys[d]
        words = words + (_words(counter, 0, low.to(tl.uint32), high.to(tl.uint32)),)  # noqa: RUF005
    return words


@triton.jit
def _moved(
    value, words, tables, field,
    FIELD: tl.constexpr, FIELD_BITS: tl.constexpr, TO_BF16: tl.constexpr,
):  # fmt: skip
    """The value as it would be stored, plus its directions. Its field is FIELD after `field`, a multiple of 8."""
    PER_WORD: tl.constexpr = 32 // FIELD_BITS
    if TO_BF16 and len(tables) > 0:
        value = _float_of(_nearest(value))
    which = field // PER_WORD + FIELD // PER_WORD
    shift = (field % PER_WORD + FIELD % PER_WORD) * FIELD_BITS
    for d in tl.static_range(len(tables)):
        lower = tl.where(which == 0, words[d][0], words[d][1])
        word = tl.where(which < 2, lower, tl.where(which == 2, words[d][2], words[d][3]))
        found = (word >> shift) & ((1 << FIELD_BITS) - 1)
        if FIELD_BITS == 1:
            value = value + tl.where(found == 0, tl.load(tables[d]), tl.load(tables[d] + 1))
        else:
            value = value + tl.load(tables[d] + found.to(tl.int32))
    return value


@triton.jit(do_not_specialize=KEYS)
def _affine(
    to, slices, scales, zeros, tables, low0, high0, low1, high1, num_elements,
    BITS: tl.constexpr, WIDTHS: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr,
    FIELD_BITS: tl.constexpr, TO_BF16: tl.constexpr,
):  # fmt: skip
    """to = (q - z) s, and directions. A program takes PART of the DEPTH tiles in each of TILES of `_lanes`."""
    first_tile = tl.program_id(0).to(tl.int64) * (TILES * DEPTH)
    first = first_tile * 512
    left = tl.minimum(num_elements - first, TILES * DEPTH * 512).to(tl.int32)
    column, first_lane, lane = _lanes(TILES, SPAN)
    counter = (tl.program_id(0).to(tl.int64) * TILES + column) * 64 + lane
    words = _noise_words(((low0, high0), (low1, high1)), counter, len(tables))
    for i in range(PART):
        depth = tl.program_id(1) * PART + i
        tile = column * DEPTH + depth
        read = _affine_bytes(slices, first_tile, tile, lane, tile * 512 < left, WIDTHS)
        for v in tl.static_range(8):
            at = tile * 512 + v * 64
            value = _affine_values(
                read, scales, zeros, first_tile, at + first_lane, left, v, BITS, WIDTHS, GROUP
            )
            value = _moved(value, words, tables, depth * 8, v, FIELD_BITS, TO_BF16)
            _store(to + first + (at + lane), value, at + lane < left)


@triton.jit(do_not_specialize=KEYS)
def _nibbles(
    to, codes, scales, offset, table, tables, low0, high0, low1, high1, num_elements,
    HIGH_FIRST: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr,
    SPAN: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr,
    FIELD_BITS: tl.constexpr, TO_BF16: tl.constexpr,
):  # fmt: skip
    """to = table[q] scale, and directions; as `_affine`."""
    first = tl.program_id(0).to(tl.int64) * (TILES * DEPTH * 512)
    left = tl.minimum(num_elements - first, TILES * DEPTH * 512).to(tl.int32)
    column, first_lane, lane = _lanes(TILES, SPAN)
    counter = (tl.program_id(0).to(tl.int64) * TILES + column) * 64 + lane
    words = _noise_words(((low0, high0), (low1, high1)), counter, len(tables))
    for i in range(PART):
        depth = tl.program_id(1) * PART + i
        tile = column * DEPTH + depth
        read = _nibble_bytes(codes, first, tile * 512 + lane, left)
        for v in tl.static_range(8):
            at = tile * 512 + v * 64
            value = _nibble_values(
                read[v], lane, scales, offset, table, first, at + first_lane, left,
                HIGH_FIRST, BLOCK, KIND, NESTED,
            )  # fmt: skip
            value = _moved(value, words, tables, depth * 8, v, FIELD_BITS, TO_BF16)
            _store(to + first + (at + lane), value, at + lane < left)


# ------------------------------------------------------------------ launches


def _launch(
    kernel: Any,
    out: torch.Tensor,
    parts: Sequence[Any],
    directions: Sequence[Direction],
    **constants: Any,
) -> None:
    """directions: of one kind. parts: the kernel's arguments from its second one to `tables`."""
    is_bf16 = out.dtype == torch.bfloat16
    flat = out.view(-1)
    # Without directions: fields so wide that philox.py's tile is one of ours.
    widest = philox.LANES * philox.COUNTER_BITS // TILE
    bits = FIELD_BITS[directions[0].kind] if directions else widest
    tiles, depth = TILES[out.dtype], philox.tile_size(bits) // TILE
    grid = (-(-flat.numel() // (tiles * depth * TILE)), -(-depth // MOST))
    kernel[grid](
        flat.view(torch.int16) if is_bf16 else flat,
        *parts,
        tuple(table_on(out.device, d.scale, d.kind) for d in directions),
        *_halves([d.key for d in directions]),
        flat.numel(),
        **constants,
        TILES=tiles,
        DEPTH=depth,
        PART=min(depth, MOST),
        FIELD_BITS=bits,
        TO_BF16=is_bf16,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def _halves(keys: Sequence[int]) -> list[int]:
    """Lower and upper 32 bits of two keys, 0 where there are fewer, as signed numbers: always of the same type."""
    padded = (*keys, 0, 0)[:2]
    halves = [key >> shift & philox.MASK for key in padded for shift in (0, 32)]
    return [half - (half >> 31 << 32) for half in halves]


def _launch_affine(
    format: Affine,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    directions: Sequence[Direction] = (),
) -> None:
    *slices, scales, zeros = parts
    _launch(
        _affine,
        out,
        (tuple(slices), scales.view(torch.int16), zeros),
        directions,
        BITS=format.bits,
        WIDTHS=format.slices,
        GROUP=format.group,
        SPAN=min(format.group, LANES),
    )


def _launch_nibbles(
    format: Nibbles | NestedNibbles | Nvfp4,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    directions: Sequence[Direction] = (),
) -> None:
    codes, *scales = parts
    plain, kind, nested, offset = NVFP4_BLOCKS, "", 1, 0.0
    if isinstance(format, NestedNibbles):
        plain = Nibbles(format.table, format.block, is_high_first=True)
        kind, nested, offset = "nested", format.nested_block, format.offset
    elif isinstance(format, Nvfp4):
        kind = "e4m3 by one" if format.is_divided else "e4m3 times one"
    else:
        plain, kind = format, format.scale
    # Dtypes that no kernel needs to know, as their bits.
    bits = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
    _launch(
        _nibbles,
        out,
        (
            codes,
            tuple(part.view(bits.get(part.dtype, part.dtype)) for part in scales),
            offset,
            _table_on(out.device, plain.table),
        ),
        directions,
        HIGH_FIRST=plain.is_high_first,
        BLOCK=plain.block,
        KIND=kind,
        NESTED=nested,
        SPAN=math.gcd(plain.block, LANES),
    )


@lru_cache(maxsize=64)
def _table_on(device: torch.device, table: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float32, device=device)


# format, parts, output: as `unpack.unpack` has them.
DECODERS: dict[type, Callable[..., None]] = {
    Affine: _launch_affine,
    **dict.fromkeys((Nibbles, NestedNibbles, Nvfp4), _launch_nibbles),
}


def unpack_add_triton(
    format: Format,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    directions: Sequence[Direction],
) -> None:
    """`unpack` into out and `noise.add_directions` of one or two directions to it, with their bits, in one pass.

    format: of DECODERS. parts, out: as `unpack` has them. Directions of two kinds, whose tiles differ, take two passes.
    """
    assert 0 < len(directions) <= len(KEYS) // 2, len(directions)
    decode = DECODERS[type(format)]
    if len({d.kind for d in directions}) == 1:
        decode(format, parts, out, directions)
    else:
        decode(format, parts, out)
        add_directions(out, out, directions, suffix=noise.TRITON)
