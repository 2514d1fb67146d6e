"""Calls lossless.c: the bits of `Lossless.by_torch`, and its errors, by far faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssdtune.kernels.decoding import DTYPES, can_stream, check, run
from ssdtune.kernels.lossless import CHUNK, Lossless, damaged
from ssdtune.kernels.structs import struct

NATIVE_PART = 64  # chunks that a thread takes at a time


def decode_lossless(
    format: Lossless, parts: Sequence[torch.Tensor], out: torch.Tensor, suffix: str
) -> None:
    """As `Lossless.by_torch`. out: on the CPU. suffix: of the native function."""
    check(format, parts, out)
    lower, *slices, dictionary, escapes, offsets = parts
    job = struct("job", "lossless.c")(
        to=out.data_ptr(),
        n=out.numel(),
        dtype=DTYPES[out.dtype],
        bits=format.bits,
        lower=lower.data_ptr(),
        codes=tuple(packed.data_ptr() for packed in slices),
        dictionary=dictionary.data_ptr(),
        escapes=escapes.data_ptr(),
        offsets=offsets.data_ptr(),
        num_escapes=format.num_escapes,
        part=NATIVE_PART * CHUNK,
        next=0,
        is_streamed=can_stream(out),
        is_damaged=0,
    )
    run("ssdtune_decode_lossless", suffix, job, f"lossless, {format.bits} bits")
    if job.is_damaged:
        raise damaged(format)
