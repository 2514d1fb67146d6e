"""base + directions, rounded, on a GPU: the Triton twin of noise.py and philox.py, which define every bit of it.

A program takes TILES tiles: 64 counters each, whose four words are cut into fields for all elements of the tile, so that
the generator runs once for 16 normal numbers or 128 signs. Directions are added one launch each, in float32 between
them, and what is rounded is rounded once, by integer operations: no conversion, fused operation or order of sums is left
to a compiler (launched with enable_fp_fusion=False).
"""

# Kernels are in Triton's language, which looks like Python and has other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ssdtune.kernels import philox
from ssdtune.kernels.noise import FIELD_BITS, Direction, table_on

TILES = 8  # of one program
KEYS = ("k0", "k1")  # new in every step: no kernel is compiled anew for their values
CHUNK = 1 << 24  # elements whose float32 sums are held at once, where there are several launches


@triton.jit
def _words(counter, domain, k0, k1):
    """Philox4x32-10 of 64-bit counters: four words of 32 bits each."""
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = (c0 & 0) + domain
    c3 = c0 & 0
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        high2 = tl.umulhi(c2, tl.full(c0.shape, 0xCD9E8D57, tl.uint32))
        low0 = c0 * 0xD2511F53
        low2 = c2 * 0xCD9E8D57
        c0 = high2 ^ c1 ^ k0
        c1 = low2
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _float_of(bits):
    """bfloat16 bits (int16) as float32."""
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _upper(value, bits):
    """What is left of a float32's moved bits as bfloat16's (int16); of what is no number, one that is none."""
    kept = tl.where(value != value, 0x7FC0, bits >> 16)
    return kept.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _nearest(value):
    """float32 to bfloat16 bits (int16), ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    return _upper(value, bits + 0x7FFF + ((bits >> 16) & 1))


@triton.jit(do_not_specialize=KEYS)
def _add(
    to, base, table, num_elements, first, k0, k1, decay,
    BITS: tl.constexpr, TILES: tl.constexpr, HAS_DECAY: tl.constexpr,
    FROM_BF16: tl.constexpr, TO_BF16: tl.constexpr,
):  # fmt: skip
    """to = base * decay + table[field]. first: number of the first element in its tensor, a multiple of a tile."""
    FIELDS: tl.constexpr = 128 // BITS
    PER_WORD: tl.constexpr = 32 // BITS
    at = tl.program_id(0).to(tl.int64) * TILES * 64 + tl.arange(0, TILES * 64)
    tile, lane = at // 64, at % 64
    words = _words(first // FIELDS + at, 0, k0.to(tl.uint32), k1.to(tl.uint32))
    for w in tl.static_range(4):
        word = words[w]
        for s in range(PER_WORD):
            element = tile * (64 * FIELDS) + (w * PER_WORD + s) * 64 + lane
            inside = element < num_elements
            field = (word >> (s * BITS)) & ((1 << BITS) - 1)
            value = tl.load(base + element, mask=inside)
            if FROM_BF16:
                value = _float_of(value)
            if HAS_DECAY:
                value = value * decay
            value = value + tl.load(table + field.to(tl.int32), mask=inside)
            if TO_BF16:
                tl.store(to + element, _nearest(value), mask=inside)
            else:
                tl.store(to + element, value, mask=inside)


@triton.jit(do_not_specialize=KEYS)
def _round_at_random(to, sums, num_elements, first, k0, k1, TILES: tl.constexpr):
    """bfloat16 bits of float32 sums: up with the probability of what is cut."""
    at = tl.program_id(0).to(tl.int64) * TILES * 64 + tl.arange(0, TILES * 64)
    tile, lane = at // 64, at % 64
    words = _words(first // 8 + at, 1, k0.to(tl.uint32), k1.to(tl.uint32))
    for w in tl.static_range(4):
        word = words[w]
        for s in range(2):
            element = tile * 512 + (w * 2 + s) * 64 + lane
            inside = element < num_elements
            value = tl.load(sums + element, mask=inside)
            bits = value.to(tl.uint32, bitcast=True)
            is_finite = (bits & 0x7F800000) != 0x7F800000
            moved = tl.where(is_finite, bits + ((word >> (s * 16)) & 0xFFFF), bits)
            tl.store(to + element, _upper(value, moved), mask=inside)


def by_triton(
    to: torch.Tensor,
    base: torch.Tensor,
    directions: Sequence[Direction],
    decay: float,
    rounding_key: int | None,
    first: int,
) -> None:
    """`noise.add_directions` of contiguous tensors, float32 or bfloat16, and one direction or more."""
    is_bf16 = base.dtype == torch.bfloat16
    at_random = is_bf16 and rounding_key is not None
    flat_to, flat = to.view(-1), base.view(-1)
    if is_bf16:
        flat_to, flat = flat_to.view(torch.int16), flat.view(torch.int16)
    needs_sums = is_bf16 and (at_random or len(directions) > 1)
    chunk = CHUNK if needs_sums else max(flat.numel(), 1)
    for at in range(0, flat.numel(), chunk):
        part, out = flat[at : at + chunk], flat_to[at : at + chunk]
        sums = torch.empty_like(part, dtype=torch.float32) if needs_sums else out
        source, factor = part, decay
        for i, direction in enumerate(directions):
            is_last = i == len(directions) - 1
            target = out if is_last and not at_random else sums
            _launch_add(target, source, direction, first + at, factor)
            source, factor = target, 1.0
        if at_random:
            assert rounding_key is not None
            grid = (-(-part.numel() // (512 * TILES)),)
            _round_at_random[grid](
                out, sums, part.numel(), first + at, *_halves(rounding_key), TILES=TILES
            )


def _launch_add(
    to: torch.Tensor, base: torch.Tensor, direction: Direction, first: int, decay: float
) -> None:
    bits = FIELD_BITS[direction.kind]
    grid = (-(-base.numel() // (philox.tile_size(bits) * TILES)),)
    _add[grid](
        to,
        base,
        table_on(base.device, direction.scale, direction.kind),
        base.numel(),
        first,
        *_halves(direction.key),
        decay,
        BITS=bits,
        TILES=TILES,
        HAS_DECAY=decay != 1.0,
        FROM_BF16=base.dtype == torch.int16,
        TO_BF16=to.dtype == torch.int16,
        enable_fp_fusion=False,
    )


def _halves(key: int) -> list[int]:
    """Lower and upper 32 bits, as signed numbers: always of the same type."""
    halves = (key & philox.MASK, key >> 32 & philox.MASK)
    return [half - (half >> 31 << 32) for half in halves]
