"""Packed weights moved in place: codes of affine.py rounded at random after a step, their scales kept.

    w = (q - z) s                                          decoded to float32, not rounded to the weights' dtype
    by = w * (decay - 1) + directions                      float32, from left to right, as `noise.add_directions`
    q <- clamp(q + floor(by / s + u), 0, 2^bits - 1)       u = k 2^-24, k the upper 24 bits of the element's field

That is floor((w + by) / s + z + u) without rounding w + by: a step is far smaller than a weight, and what it moves by
counts to 2^-24 of the distance between two codes. So a code goes up with the probability of what a rounding to nearest
would lose, and the mean over u is the moved weight, where it lies between the first and the last code. by / s + u that is
no number leaves the code as it is.

A *field* is one of 32 bits, of `philox.CODES` and the move's rounding key. Codes are read and written at the width of the
format: of nested slices those that it reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ssdtune.kernels import philox
from ssdtune.kernels.affine import CHUNK, LANES, TILE, Affine, join_slices, split_codes
from ssdtune.kernels.native import has_triton, library
from ssdtune.kernels.noise import NATIVE_PART, NativeNoise, add_directions
from ssdtune.kernels.structs import struct
from ssdtune.kernels.team import run_by_all
from ssdtune.kernels.unpack import TRITON
from ssdtune.kernels.unpack_add import Move
from ssdtune.kernels.unpack_native import affine_job

UNIT = 2.0**-24
MOST = 1024.0  # steps that a code can be moved by; there are fewer codes


def requantize(
    format: Affine,
    parts: Sequence[torch.Tensor],
    shape: Sequence[int],
    move: Move,
    *,
    suffix: str | None = None,
) -> None:
    """The packed tensor takes a step, in place.

    parts: as `format.parts(shape)` says, contiguous; the slices among them are written. move: has a rounding key.
    suffix: of the native function; None: the best there is; "" for torch; TRITON for its kernels.
    """
    assert move.rounding_key is not None
    device = parts[0].device
    if suffix is None:
        suffix = _best(device)
    if suffix == TRITON:
        from ssdtune.kernels.requantize_triton import by_triton

        by_triton(format, parts, torch.Size(shape).numel(), move)
    elif suffix:
        _natively(format, parts, shape, move, suffix)
    else:
        weights = torch.empty(tuple(shape), device=device)
        format.by_torch(parts, weights)
        by = torch.empty_like(weights)
        add_directions(by, weights, move.directions, decay=move.decay - 1, suffix="")
        move_codes(format, parts, by, move.rounding_key)


def _best(device: torch.device) -> str:
    if device.type == "cpu":
        native = library()
        return "" if native is None else native.suffixes[0]
    return TRITON if device.type == "cuda" and has_triton() else ""


def move_codes(format: Affine, parts: Sequence[torch.Tensor], by: torch.Tensor, key: int) -> None:
    """Codes moved by so much, float32 of the tensor's shape, and rounded at random: the definition."""
    *slices, scales, _ = parts
    flat = by.reshape(-1)
    for first in range(0, flat.numel(), CHUNK):
        some = flat[first : first + CHUNK]
        tiles = range(first // TILE, -(-(first + len(some)) // TILE))
        pieces = [
            packed[tiles.start * LANES * width : tiles.stop * LANES * width]
            for packed, width in zip(slices, format.slices, strict=True)
        ]
        groups = slice(first // format.group, -(-(first + len(some)) // format.group))
        scale = scales[groups].float().repeat_interleave(format.group)[: len(some)]
        codes = join_slices(pieces, format.slices)
        codes[: len(some)] = _moved(codes[: len(some)], some / scale, format.bits, key, first)
        for packed, made in zip(pieces, split_codes(codes, format.slices), strict=True):
            packed.copy_(made)


def _moved(
    codes: torch.Tensor, steps: torch.Tensor, bits: int, key: int, first: int
) -> torch.Tensor:
    """Codes, uint8, after so many steps of theirs, float32. first: number of the first of them."""
    field = philox.fields(
        key, first, codes.numel(), bits=32, domain=philox.CODES, device=codes.device
    )
    moved = (steps + (field >> 8).float() * UNIT).clamp(-MOST, MOST)
    whole = torch.where(moved.isnan(), 0.0, moved).floor()
    return (codes.float() + whole).clamp(0, 2**bits - 1).to(torch.uint8)


def _natively(
    format: Affine, parts: Sequence[torch.Tensor], shape: Sequence[int], move: Move, suffix: str
) -> None:
    native = library()
    assert native is not None
    assert move.rounding_key is not None
    like = torch.empty(tuple(shape), device="meta")  # decoded to scratch, never there
    packed = affine_job(format, parts, like)
    noise = NativeNoise(move.directions, torch.float32, decay=move.decay - 1, rounding_key=None)
    job = struct("requantize", "requantize.c")(
        packed=ctypes.addressof(packed),
        move=noise.address,
        key=move.rounding_key,
        part=NATIVE_PART,
        next=0,
    )
    num_parts = -(-like.numel() // NATIVE_PART)
    run_by_all(native.function("ssdtune_requantize", suffix), job, num_parts)
