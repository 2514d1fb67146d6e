"""Calls integers.c: the bits of `by_torch` of the formats in integers.py and float8.py, by far faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssdtune.kernels.decoding import DTYPES, can_stream, check, nan_bits, run
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.integers import RUN, num_groups
from ssdtune.kernels.scaled_rows import (
    ACROSS,
    ALONG,
    AWQ,
    FORMATS,
    FP8,
    INT8,
    Rows,
    Words,
    rows_of,
)
from ssdtune.kernels.structs import struct

PART = 1 << 18  # elements, about, that a thread takes at a time
# What they are called where stores are timed.
KERNELS = {ALONG: "packed integers", ACROSS: "GPTQ", AWQ: "AWQ", INT8: "INT8", FP8: "FP8"}


def decode_rows(
    format: Words | ScaledBytes,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    suffix: str,
) -> None:
    """As `by_torch` of the formats."""
    check(format, parts, out)
    if not isinstance(format, ScaledBytes) and format.is_ordered:
        order, groups = parts[-1], num_groups(out.shape[1], format.group)
        if not 0 <= int(order.min()) <= int(order.max()) < groups:
            raise IndexError(f"a column is in no group of {groups}")
    for rows in rows_of(format, parts, out):
        _run(rows, suffix)


DECODERS: dict[type, Callable[[Any, Sequence[torch.Tensor], torch.Tensor, str], None]] = (
    dict.fromkeys(FORMATS, decode_rows)
)


def _run(rows: Rows, suffix: str) -> None:
    num_rows, width = rows.out.shape
    part = max(1, PART // (RUN * width)) * RUN
    job = struct("integers", "integers.c")(
        to=rows.out.data_ptr(),
        codes=rows.codes.data_ptr(),
        zeros=rows.zeros.data_ptr(),
        scales=rows.scales.data_ptr(),
        order=None if rows.order is None else rows.order.data_ptr(),
        n=num_rows,
        width=width,
        stride=rows.stride,
        groups=rows.scales.shape[1],
        group=rows.group,
        bits=rows.bits,
        layout=rows.layout,
        dtype=DTYPES[rows.out.dtype],
        nan=nan_bits(),
        is_streamed=can_stream(rows.out),
        part=part,
        next=0,
    )
    run("ssdtune_unpack_integers", suffix, job, KERNELS[rows.layout])
