"""Calls integers.c: the bits of `by_torch` of the formats in integers.py and float8.py, by far faster."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssdtune.kernels.decoding import DTYPES, check, is_streamed, nan_bits, run
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.integers import RUN, Awq, Gptq, PackQuantized, num_groups, row_slices

PART = 1 << 18  # elements, about, that a thread takes at a time
# Scales that are brought to float32 before rows are decoded by them: 2 MB, and as much of zeros.
NUM_SCALES = 1 << 19
ALONG, ACROSS, AWQ = 0, 1, 2
LAYOUTS: dict[type, int] = {PackQuantized: ALONG, Gptq: ACROSS, Awq: AWQ}
BYTES = {"I8": 3, "F8_E4M3": 4}


class _Job(ctypes.Structure):
    """struct integers of integers.c."""

    _fields_ = (
        ("to", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("layout", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("nan", ctypes.c_int64),
        ("is_streamed", ctypes.c_int64),
        ("part", ctypes.c_int64),
        ("next", ctypes.c_int64),
    )


def decode_words(
    format: Gptq | Awq | PackQuantized,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    suffix: str,
) -> None:
    """As `by_torch` of the formats."""
    check(format, parts, out)
    words, order = parts[0], parts[-1] if format.is_ordered else None
    groups = num_groups(out.shape[1], format.group)
    if order is not None and not 0 <= int(order.min()) <= int(order.max()) < groups:
        raise IndexError(f"a column is in no group of {groups}")
    layout = LAYOUTS[type(format)]
    fields = {
        "group": format.group,
        "layout": layout,
        "stride": words.shape[1],
        "bits": format.bits,
        "order": None if order is None else order.data_ptr(),
    }
    for some in row_slices(len(out), groups, NUM_SCALES):
        per_word = 8 if layout == AWQ else 1  # rows
        codes = words[some.start :] if layout == ALONG else words[:, some.start // per_word :]
        _run(out[some], codes, format.scaling(parts, some), suffix, **fields)


def decode_bytes(
    format: ScaledBytes, parts: Sequence[torch.Tensor], out: torch.Tensor, suffix: str
) -> None:
    """As `ScaledBytes.by_torch`."""
    check(format, parts, out)
    fields = {
        "group": format.block[1],
        "layout": BYTES[format.codes],
        "stride": out.shape[-1],
        "bits": 8,
    }
    for codes, scales, matrix in zip(*format.matrices(parts, out), strict=True):
        for some in row_slices(len(matrix), scales.shape[1], NUM_SCALES):
            _run(matrix[some], codes[some], format.scaling(scales, some), suffix, **fields)


DECODERS: dict[type, Callable[[Any, Sequence[torch.Tensor], torch.Tensor, str], None]] = {
    Gptq: decode_words,
    Awq: decode_words,
    PackQuantized: decode_words,
    ScaledBytes: decode_bytes,
}


def _run(
    out: torch.Tensor,
    codes: torch.Tensor,
    scaling: tuple[torch.Tensor, torch.Tensor],
    suffix: str,
    **fields: int | None,
) -> None:
    """Decodes a few rows. codes: begins with what the first of them is made of. fields: of the job."""
    zeros, scales = (x.to(torch.float32).contiguous() for x in scaling)
    rows, width = out.shape
    part = max(1, PART // (RUN * width)) * RUN
    job = _Job(
        to=out.data_ptr(),
        codes=codes.data_ptr(),
        zeros=zeros.data_ptr(),
        scales=scales.data_ptr(),
        rows=rows,
        width=width,
        groups=scales.shape[1],
        dtype=DTYPES[out.dtype],
        nan=nan_bits(),
        is_streamed=is_streamed(out),
        part=part,
        next=0,
        **fields,
    )
    run("ssdtune_unpack_integers", suffix, job, -(-rows // part))
