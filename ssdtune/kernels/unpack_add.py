"""Packed tensors decoded and moved along random directions, in one pass where that is fastest.

    out = round(... round(round(decoded) * decay_1 + directions_1) * decay_2 + directions_2 ...)

The bits are those of `unpack.unpack` into `out` and then `noise.add_directions` of each move in place: roundings in
between included, so that it makes no difference who keeps decoded weights and who does not. Native code does it piece by
piece, while the piece is in the nearest caches (`unpack_add.c`); Triton's kernels decode and move in registers
(`unpack_triton.py`), where the first move only adds.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterable, Sequence

import torch

from ssdtune.kernels.affine import Affine
from ssdtune.kernels.decoding import larger, settled
from ssdtune.kernels.formats import Format
from ssdtune.kernels.native import has_triton, library
from ssdtune.kernels.nibbles import NestedNibbles, Nibbles, Nvfp4, Slab
from ssdtune.kernels.noise import DTYPES, NATIVE_PART, TILE, Direction, NativeNoise, add_directions
from ssdtune.kernels.structs import struct
from ssdtune.kernels.team import run_by_all
from ssdtune.kernels.unpack import TRITON, unpack
from ssdtune.kernels.unpack_native import (
    FOUR_BIT_TABLES,
    affine_job,
    has_fast_paths,
    kernel_of,
    nibbles_job,
)

MOST_DIRECTIONS = 2  # that Triton's kernels add on the way


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """A step that weights take: times decay, plus directions, rounded once, as `noise.add_directions` has it."""

    directions: tuple[Direction, ...]
    decay: float = 1.0
    rounding_key: int | None = None


def unpack_add(
    format: Format,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    moves: Sequence[Move],
    *,
    suffix: str | None = None,
) -> None:
    """out = what the parts stand for, rounded to its dtype, after the moves.

    parts, out: as `unpack.unpack` has them. suffix: of the native function; None: the best there is; "" for torch, in
    several passes; TRITON for its kernels.
    """
    assert out.is_contiguous()
    if not out.numel():
        return
    if suffix is None:
        suffix = _best(format, out)
    if suffix == TRITON:
        _by_triton(format, parts, out, moves)
    elif suffix and moves and _is_in_pieces(format, out):
        for slab in _slabs(format, parts, out):
            _natively(slab, moves, suffix)
    else:
        _in_passes(format, parts, out, moves, suffix)


def _best(format: Format, out: torch.Tensor) -> str:
    if out.dtype in DTYPES:
        native = library()
        if out.device.type == "cpu" and native is not None:
            return native.suffixes[0]
        if out.device.type == "cuda" and has_triton():
            return TRITON
    return ""


def _in_passes(
    format: Format,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    moves: Sequence[Move],
    suffix: str,
) -> None:
    """The definition. suffix: "" or of native functions, for what they know."""
    unpack(format, parts, out, suffix="" if suffix == "" else None)
    _move(out, moves, "" if suffix == "" or out.dtype not in DTYPES else suffix)


def _move(out: torch.Tensor, moves: Sequence[Move], suffix: str) -> None:
    for move in moves:
        add_directions(
            out,
            out,
            move.directions,
            decay=move.decay,
            rounding_key=move.rounding_key,
            suffix=suffix if move.directions else "",
        )


# ------------------------------------------------------------------ native


def _is_in_pieces(format: Format, out: torch.Tensor) -> bool:
    """Whether native code can begin to decode at every piece."""
    if out.dtype not in DTYPES:
        return False
    if isinstance(format, Nibbles | NestedNibbles):
        inner = Nibbles(format.table, format.block, is_high_first=True)
        return TILE % format.block == 0 and has_fast_paths(inner)
    return isinstance(format, Affine | Nvfp4)


@dataclasses.dataclass(frozen=True, slots=True)
class _Whole:
    """As `nibbles.Slab`: a tensor that needs no preparation."""

    format: Affine | Nibbles
    parts: Sequence[torch.Tensor]
    out: torch.Tensor
    first: int = 0


def _slabs(
    format: Format, parts: Sequence[torch.Tensor], out: torch.Tensor
) -> Iterable[Slab | _Whole]:
    if isinstance(format, NestedNibbles | Nvfp4):
        return format.slabs(parts, out)
    assert isinstance(format, Affine | Nibbles)
    return [_Whole(format, parts, out)]


def _natively(slab: Slab | _Whole, moves: Sequence[Move], suffix: str) -> None:
    native = library()
    assert native is not None
    out = slab.out
    if isinstance(slab.format, Affine):
        packed, kind, kernel = (
            affine_job(slab.format, slab.parts, out),
            "affine",
            kernel_of(slab.format),
        )
    else:
        packed, kind, kernel = nibbles_job(slab.format, slab.parts, out), "nibbles", FOUR_BIT_TABLES
    settled(f"ssdtune_unpack_{kind}", suffix, packed, kernel)
    decode, decode_signs = (
        ctypes.cast(native.function(f"ssdtune_{kind}_{what}", suffix), ctypes.c_void_p)  # type: ignore[arg-type]
        for what in ("piece", "signs")
    )
    noises = [
        NativeNoise(m.directions, out.dtype, decay=m.decay, rounding_key=m.rounding_key)
        for m in moves
    ]
    addresses = (ctypes.c_void_p * len(noises))(*(noise.address for noise in noises))
    n = out.numel()
    part = larger(NATIVE_PART, n, torch.get_num_threads())
    job = struct("unpack_add", "unpack_add.c")(
        to=out.data_ptr(),
        decode=decode,
        decode_signs=decode_signs,
        packed=ctypes.addressof(packed),
        moves=ctypes.addressof(addresses),
        num_moves=len(noises),
        n=n,
        size=out.element_size(),
        start=slab.first,
        part=part,
        next=0,
    )
    run_by_all(native.function("ssdtune_unpack_add", suffix), job, -(-n // part))


# ------------------------------------------------------------------ Triton


def _by_triton(
    format: Format, parts: Sequence[torch.Tensor], out: torch.Tensor, moves: Sequence[Move]
) -> None:
    from ssdtune.kernels import unpack_triton

    left = list(moves)
    first = left[0] if left else Move(())
    adds = first.decay == 1.0 and first.rounding_key is None
    if (
        adds
        and 0 < len(first.directions) <= MOST_DIRECTIONS
        and type(format) in unpack_triton.DECODERS
    ):
        unpack_triton.unpack_add_triton(format, parts, out, left.pop(0).directions)
    else:
        unpack(
            format, parts, out, suffix=TRITON if type(format) in unpack_triton.DECODERS else None
        )
    _move(out, left, TRITON)
