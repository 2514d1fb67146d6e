"""Packed tensors decoded by unpack.c: the bits of the formats' own `by_torch`, several times faster.

One exception: what is no number stays so, but where a float16 scale is none, the payload in float32 may be another one
(torch's own depends on where in a tensor the scale lies).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from ssdtune.kernels.affine import TILE, Affine
from ssdtune.kernels.decoding import ALIGNMENT, DTYPES, can_stream, check, nan_bits, run
from ssdtune.kernels.nibbles import NVFP4_BLOCKS, SCALE_DTYPES, Nibbles, Nvfp4, scale_of
from ssdtune.kernels.rotated import Rotated
from ssdtune.kernels.structs import struct

SCALE_KINDS = {"F32": 0, "BF16": 1, "F16": 2, "F8_E4M3": 3, "E8M0": 3, "UE5M3": 3}
PART = 512 * TILE  # elements, about, that a thread takes at a time
FOUR_BIT_TABLES = "four-bit tables"  # what their kernel is called where stores are timed


def affine_job(
    format: Affine, parts: Sequence[torch.Tensor], out: torch.Tensor, *, is_rotated: bool = False
) -> ctypes.Structure:
    """What native code needs; the tensors must stay alive. out: where to, and the dtype and size of what is made."""
    check(format, parts, out)
    *slices, scales, zeros = parts
    return struct("affine", "pieces.h")(
        to=out.data_ptr(),
        slices=tuple(packed.data_ptr() for packed in slices),
        num_slices=len(slices),
        widths=sum(width << 4 * s for s, width in enumerate(format.slices)),
        scales=scales.data_ptr(),
        zeros=zeros.data_ptr(),
        n=out.numel(),
        group=format.group,
        bits=format.bits,
        is_rotated=is_rotated,
        dtype=DTYPES[out.dtype],
        nan=nan_bits(),
        is_streamed=can_stream(out),
        part=PART,
        next=0,
    )


def _affine(format: Affine, parts: Sequence[torch.Tensor], out: torch.Tensor, suffix: str) -> None:
    run("ssdtune_unpack_affine", suffix, affine_job(format, parts, out), kernel_of(format))


def kernel_of(format: Affine) -> str:
    """What decodes it is called so where stores are timed."""
    return f"{format.bits} bits"


def has_fast_paths(format: Nibbles) -> bool:
    """Whether native code decodes it: its fast paths take it that only scales can make NaNs."""
    return all(map(math.isfinite, format.table))


def _rotated(
    format: Rotated, parts: Sequence[torch.Tensor], out: torch.Tensor, suffix: str
) -> None:
    job = affine_job(format.stored, parts, out, is_rotated=True)
    run("ssdtune_unpack_affine", suffix, job, "rotated")


def _nibbles(
    format: Nibbles, parts: Sequence[torch.Tensor], out: torch.Tensor, suffix: str
) -> None:
    if not has_fast_paths(format):
        format.by_torch(parts, out)
        return
    job = nibbles_job(format, parts, out)
    run("ssdtune_unpack_nibbles", suffix, job, FOUR_BIT_TABLES)


def _nvfp4(format: Nvfp4, parts: Sequence[torch.Tensor], out: torch.Tensor, suffix: str) -> None:
    """Blocks' scales are bytes: what comes out for each of the 256 has the scale of all in it."""
    codes, scales, stored = parts
    by_scale = _by_scale(NVFP4_BLOCKS, format.scaled(_every(NVFP4_BLOCKS), stored), out.dtype)
    job = nibbles_job(NVFP4_BLOCKS, (codes, scales), out, by_scale)
    run("ssdtune_unpack_nibbles", suffix, job, FOUR_BIT_TABLES)


def nibbles_job(
    format: Nibbles,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    by_scale: torch.Tensor | None = None,
) -> ctypes.Structure:
    """As `affine_job`; of a format that has fast paths. by_scale: what comes out for each scale of a byte, as `_by_scale`
    has it, where that is not what the format says."""
    check(format, parts, out)
    codes, scales = parts
    unit = math.lcm(format.block, ALIGNMENT)
    part = max(1, PART // unit) * unit
    table, usual = _tables(format, out.dtype)
    by_scale = usual if by_scale is None else by_scale
    job = struct("nibbles", "unpack.c")(
        to=out.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        table=table.data_ptr(),
        by_scale=by_scale.data_ptr(),
        n=out.numel(),
        block=format.block,
        is_high_first=format.is_high_first,
        scale_kind=SCALE_KINDS[format.scale],
        dtype=DTYPES[out.dtype],
        nan=nan_bits(),
        is_streamed=can_stream(out),
        part=part,
        next=0,
    )
    job.alive = table, by_scale  # type: ignore[attr-defined]
    return job


DECODERS: dict[type, Callable[[Any, Sequence[torch.Tensor], torch.Tensor, str], None]] = {
    Affine: _affine,
    Rotated: _rotated,
    Nibbles: _nibbles,
    Nvfp4: _nvfp4,
}


@lru_cache(maxsize=16)  # 8 or 16 KB each
def _tables(format: Nibbles, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 values, float32; what comes out for each scale of a byte, as `_by_scale` has it."""
    table = torch.tensor(format.table, dtype=torch.float32)
    if SCALE_KINDS[format.scale] != SCALE_KINDS["E8M0"]:
        return table, torch.empty(0)
    return table, _by_scale(format, scale_of(_every(format), format.scale), dtype)


def _every(format: Nibbles) -> torch.Tensor:
    """All 256 scales of a byte, as they are stored."""
    return torch.arange(256, dtype=torch.uint8).view(SCALE_DTYPES[format.scale])


def _by_scale(format: Nibbles, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The 16 values times each of the scales, float32 [256], for outputs of that dtype: float16 is made of float32."""
    products = torch.tensor(format.table) * scales.unsqueeze(1)
    return products if dtype == torch.float16 else products.to(dtype)
