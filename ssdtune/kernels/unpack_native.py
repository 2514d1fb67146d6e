"""Packed tensors decoded by unpack.c: the bits of the formats' own `by_torch`, several times faster.

One exception: what is no number stays so, but where a float16 scale is none, the payload in float32 may be another one
(torch's own depends on where in a tensor the scale lies).
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import torch

from ssdtune.kernels.affine import TILE, Affine
from ssdtune.kernels.formats import Format
from ssdtune.kernels.native import library
from ssdtune.kernels.nibbles import SCALE_DTYPES, Nibbles, scale_of

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
SCALE_KINDS = {"F32": 0, "BF16": 1, "F16": 2, "F8_E4M3": 3, "E8M0": 3}
MAX_SLICES = 8
PART = 512 * TILE  # elements, about, that a thread takes at a time
ALIGNMENT = 64  # bytes, of streamed outputs
# Outputs of so many bytes are stored past the caches, as memcpy does it. Measured with 8 MB of last-level cache: larger
# ones cost half as much again if they go through it, smaller ones a fifth more, to whoever reads them next, if they
# don't; at 4 MB it makes no difference.
STREAM_BYTES = 4 << 20


class Threads:
    """Threads that decode one tensor together: whoever calls, and a pool of the others. num_threads: all of them."""

    def __init__(self, num_threads: int) -> None:
        assert num_threads > 0, num_threads
        self.num_threads = num_threads
        self._others = ThreadPoolExecutor(num_threads, thread_name_prefix="ssdtune-unpack")

    def run(self, function: Callable[..., None], job: ctypes.Structure, num_parts: int) -> None:
        """function(&job) on as many threads as there are parts; back when all are."""
        address = ctypes.c_void_p(ctypes.addressof(job))
        num_others = min(self.num_threads, num_parts) - 1
        others = [self._others.submit(function, address) for _ in range(num_others)]
        function(address)
        for other in others:
            other.result()


# Decoding goes on beside computing, on the same cores.
_threads = Threads(max(1, len(os.sched_getaffinity(0)) // 4))


def set_threads(num_threads: int) -> None:
    """How many threads decode a tensor from now on, the caller's among them. By default a quarter of the cores."""
    global _threads
    _threads = Threads(num_threads)


class _Affine(ctypes.Structure):
    """struct affine of unpack.c."""

    _fields_ = (
        ("to", ctypes.c_void_p),
        ("slices", ctypes.c_void_p * MAX_SLICES),
        ("num_slices", ctypes.c_int64),
        ("widths", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("nan", ctypes.c_int64),
        ("is_streamed", ctypes.c_int64),
        ("part", ctypes.c_int64),
        ("next", ctypes.c_int64),
    )


class _Nibbles(ctypes.Structure):
    """struct nibbles of unpack.c."""

    _fields_ = (
        ("to", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("by_scale", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("is_high_first", ctypes.c_int64),
        ("scale_kind", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("nan", ctypes.c_int64),
        ("is_streamed", ctypes.c_int64),
        ("part", ctypes.c_int64),
        ("next", ctypes.c_int64),
    )


def _affine(format: Affine, parts: Sequence[torch.Tensor], out: torch.Tensor, suffix: str) -> None:
    _check(format, parts, out)
    *slices, scales, zeros = parts
    job = _Affine(
        to=out.data_ptr(),
        slices=(ctypes.c_void_p * MAX_SLICES)(*(packed.data_ptr() for packed in slices)),
        num_slices=len(slices),
        widths=sum(width << 4 * s for s, width in enumerate(format.slices)),
        scales=scales.data_ptr(),
        zeros=zeros.data_ptr(),
        n=out.numel(),
        group=format.group,
        bits=format.bits,
        dtype=DTYPES[out.dtype],
        nan=_nan_bits(),
        is_streamed=_is_streamed(out),
        part=PART,
        next=0,
    )
    _threads.run(_function("ssdtune_unpack_affine", suffix), job, -(-out.numel() // PART))


def _nibbles(
    format: Nibbles, parts: Sequence[torch.Tensor], out: torch.Tensor, suffix: str
) -> None:
    if not all(map(math.isfinite, format.table)):
        format.by_torch(parts, out)  # the fast paths take it that only scales can make NaNs
        return
    _check(format, parts, out)
    codes, scales = parts
    unit = math.lcm(format.block, ALIGNMENT)
    part = max(1, PART // unit) * unit
    table, by_scale = _tables(format, out.dtype)
    job = _Nibbles(
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
        nan=_nan_bits(),
        is_streamed=_is_streamed(out),
        part=part,
        next=0,
    )
    _threads.run(_function("ssdtune_unpack_nibbles", suffix), job, -(-out.numel() // part))


DECODERS: dict[type, Callable[[Any, Sequence[torch.Tensor], torch.Tensor, str], None]] = {
    Affine: _affine,
    Nibbles: _nibbles,
}


def _function(name: str, suffix: str) -> Callable[..., None]:
    native = library()
    assert native is not None
    return native.function(name, suffix)


def _check(format: Format, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Native code reads what it is told to: the parts must be there, whole."""
    assert out.is_contiguous()
    needed = _part_sizes(format, tuple(out.shape))
    assert tuple(part.numel() for part in parts) == needed, (format.label, needed)
    assert all(part.is_contiguous() for part in parts), format.label


@lru_cache(maxsize=1024)  # a model has fewer; they take as long as decoding 10,000 elements
def _part_sizes(format: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements of each part."""
    return tuple(math.prod(part.shape) for part in format.parts(shape))


def _is_streamed(out: torch.Tensor) -> bool:
    return out.nbytes >= STREAM_BYTES and out.data_ptr() % ALIGNMENT == 0


@cache
def _nan_bits() -> int:
    """What torch on this processor makes of a NaN in bfloat16: 0xFFFF with AVX2, 0x7FC0 without."""
    return int(torch.full((1,), math.nan).bfloat16().view(torch.int16).item()) & 0xFFFF


@lru_cache(maxsize=16)  # 8 or 16 KB each
def _tables(format: Nibbles, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 values, float32; what comes out for each scale of a byte, dtype [256, 16]."""
    table = torch.tensor(format.table, dtype=torch.float32)
    if SCALE_KINDS[format.scale] != SCALE_KINDS["E8M0"]:
        return table, torch.empty(0)
    every = torch.arange(256, dtype=torch.uint8).view(SCALE_DTYPES[format.scale])
    return table, (table * scale_of(every, format.scale).unsqueeze(1)).to(dtype)
