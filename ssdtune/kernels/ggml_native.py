"""Calls ggml.c: the bits of `Ggml.by_torch`, many times faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssdtune.kernels.decoding import DTYPES, can_stream, check, nan_bits, run
from ssdtune.kernels.ggml import KINDS, Ggml
from ssdtune.kernels.structs import struct

PART = 1 << 18  # elements that a thread takes at a time


def decode_ggml(
    format: Ggml, parts: Sequence[torch.Tensor], out: torch.Tensor, suffix: str
) -> None:
    """As `by_torch`."""
    kind = KINDS[format.kind]
    if kind.block == 1:  # values, which torch converts
        format.by_torch(parts, out)
        return
    check(format, parts, out)
    job = struct("ggml", "ggml.c")(
        to=out.data_ptr(),
        blocks=parts[0].data_ptr(),
        n=out.numel(),
        kind=kind.number,
        block=kind.block,
        num_bytes=kind.num_bytes,
        dtype=DTYPES[out.dtype],
        nan=nan_bits(),
        is_streamed=can_stream(out),
        part=PART,
        next=0,
    )
    run("ssdtune_unpack_ggml", suffix, job, "GGUF")


DECODERS: dict[type, Callable[[Any, Sequence[torch.Tensor], torch.Tensor, str], None]] = {
    Ggml: decode_ggml
}
