"""What the math libraries keep between calls, and the bound that is put on it.

On a CPU with instructions for half precision torch gives products of bfloat16 and float16 to oneDNN, which compiles
code for each shape and keeps it, as torch keeps what it made of it: 1024 each, about a megabyte in all for a shape. Rows
of ever new lengths are ever new shapes: a process of 1.4 GB held 2.4 GB after a few minutes. To compile a product anew
takes 0.3 ms. Products of float32 go to MKL, which keeps nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from ssdtune.schedule.memory import LIBRARY_BYTES

CACHE_KEYS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # torch's and oneDNN's
# A block with adapters has some 30 products: of one length in each direction they all stay. With 16 a step of SmolLM2
# took 5 % longer than with 128.
MOST_PRODUCTS = 64
PRODUCT_BYTES = (
    1_200_000  # in both caches: 128 took 150 MB, over 14 steps with rows of many lengths
)


def bound_caches() -> None:
    """Products that are kept are MOST_PRODUCTS at most, unless the environment says another number.

    The libraries look once, at the first product in half precision: what comes after it changes nothing.
    """
    for key in CACHE_KEYS:
        os.environ.setdefault(key, str(MOST_PRODUCTS))


def library_bytes(dtypes: Iterable[torch.dtype], *, lengths_vary: bool) -> int:
    """Bytes that the libraries come to hold in RAM where products are computed on the CPU.

    dtypes: of the weights; under autocast its own counts. lengths_vary: whether rows have many lengths.
    """
    if torch.is_autocast_enabled("cpu"):
        dtypes = [torch.get_autocast_dtype("cpu")]
    if lengths_vary and any(_is_compiled(dtype) for dtype in dtypes):
        return LIBRARY_BYTES + MOST_PRODUCTS * PRODUCT_BYTES
    return LIBRARY_BYTES


def _is_compiled(dtype: torch.dtype) -> bool:
    """Whether torch gives products of such numbers to oneDNN on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    ask = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(dtype)
    return ask is not None and bool(getattr(torch.ops.mkldnn, ask)())
