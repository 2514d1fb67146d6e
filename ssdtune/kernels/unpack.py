"""Decodes packed tensors by what is fastest here: native code, Triton's kernels on a GPU, torch where neither is.

All of them give the bits of the format's own `by_torch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from ssdtune.kernels.decoding import DTYPES
from ssdtune.kernels.formats import Format
from ssdtune.kernels.lossless import Lossless
from ssdtune.kernels.native import has_triton, library
from ssdtune.kernels.rotated import Rotated

TRITON = "_triton"
Decoder = Callable[[Format, Sequence[torch.Tensor], torch.Tensor], None]


def unpack(
    format: Format,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    suffix: str | None = None,
) -> None:
    """out = what the parts stand for, rounded to its dtype.

    parts: as `format.parts` says, contiguous, on the device of `out`. out: contiguous, float32, bfloat16 or float16.
    suffix: of the native function; None: the best there is; "" for torch; TRITON for its kernels.
    """
    assert out.is_contiguous()
    if not out.numel():
        return
    _decoder(format, out, suffix)(format, parts, out)


def _decoder(format: Format, out: torch.Tensor, suffix: str | None) -> Decoder:
    if suffix is None:
        suffix = _best(format, out)
    if suffix == "":
        return lambda format, parts, out: format.by_torch(parts, out)
    if suffix == TRITON:
        return _kernels()[type(format)]
    decoder = _natives()[type(format)]
    return lambda format, parts, out: decoder(format, parts, out, suffix)


def _best(format: Format, out: torch.Tensor) -> str:
    """What is fastest for this format and output."""
    if out.dtype not in DTYPES:
        return ""
    if out.device.type == "cpu":
        native = library()
        return native.suffixes[0] if native is not None and type(format) in _natives() else ""
    is_known = out.device.type == "cuda" and has_triton() and type(format) in _kernels()
    return TRITON if is_known else ""


@cache
def _natives() -> dict[type, Callable[..., None]]:
    """What native code decodes: (format, parts, out, suffix)."""
    from ssdtune.kernels import ggml_native, integers_native, unpack_native
    from ssdtune.kernels.lossless_native import decode_lossless

    return {
        **unpack_native.DECODERS,
        **integers_native.DECODERS,
        **ggml_native.DECODERS,
        Lossless: decode_lossless,
    }


def _kernels() -> dict[type, Callable[..., None]]:
    """What Triton's kernels decode: (format, parts, out)."""
    from ssdtune.kernels import (
        ggml_triton,
        integers_triton,
        lossless_triton,
        rotated_triton,
        unpack_triton,
    )

    return {
        **unpack_triton.DECODERS,
        **integers_triton.DECODERS,
        **ggml_triton.DECODERS,
        Rotated: rotated_triton.decode_rotated,
        Lossless: lossless_triton.decode_lossless,
    }
