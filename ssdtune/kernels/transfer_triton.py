"""Activations or gradients packed on a GPU: the Triton twin of what transfer.py defines, bit for bit.

A program takes one group in each of ROWS rows. (Nothing has run on a GPU yet.)
"""

# Kernels are in Triton's language, which looks like Python and has other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ssdtune.kernels.noise_triton import KEYS, _float_of, _halves, _words

ELEMENTS = 2048  # of one program
WARPS = 4


@triton.jit
def _rounded_at_random(steps, element, k0, k1):
    """floor(steps + u), u by each element's field."""
    counter = element // 256 * 64 + element % 64
    words = _words(counter, 2, k0.to(tl.uint32), k1.to(tl.uint32))
    which = element // 64 % 4
    lower = tl.where(which == 0, words[0], words[1])
    word = tl.where(which < 2, lower, tl.where(which == 2, words[2], words[3]))
    return tl.floor(steps + (word >> 8).to(tl.int32).to(tl.float32) * 2.0**-24)


@triton.jit(do_not_specialize=KEYS)
def _pack(
    codes, scales, values, num_rows, columns, groups, k0, k1,
    IS_RANDOM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """values: float32, float16, or bfloat16's bits."""
    group = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = group * GROUP + tl.arange(0, GROUP)[None, :]
    is_there = (row < num_rows) & (column < columns)
    element = row * columns + column
    value = tl.load(values + element, mask=is_there, other=0)
    if values.dtype.element_ty == tl.int16:
        value = _float_of(value)
    else:
        value = value.to(tl.float32)
    # By their bits, which have the order of the magnitudes, and what is no number above all: tl.max might pass it over.
    size = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(size, axis=1)[:, None]
    most = largest.to(tl.float32, bitcast=True)
    scale = tl.where(
        largest < 0x7F800000, tl.div_rn(most, tl.full(most.shape, 127.0, tl.float32)), float("nan")
    )
    steps = tl.div_rn(value, tl.broadcast_to(scale, value.shape))
    if IS_RANDOM:
        whole = _rounded_at_random(steps, element, k0, k1)
    else:
        # From 3 x 2^22 on float32 has steps of 1: rounded to nearest, ties to even.
        whole = (steps + 12582912.0) - 12582912.0
    whole = tl.where(whole != whole, 0.0, whole)
    whole = tl.where(whole > 127.0, 127.0, tl.where(whole < -127.0, -127.0, whole))
    tl.store(codes + element, whole.to(tl.int8), mask=is_there)
    tl.store(scales + row * groups + group, scale, mask=row < num_rows)


def by_triton(
    codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, group: int, key: int | None
) -> None:
    """`transfer.pack` into codes and scales."""
    rows, columns = values.shape
    tile_rows = ELEMENTS // group
    _pack[(scales.shape[1], -(-rows // tile_rows))](
        codes,
        scales,
        values.view(torch.int16) if values.dtype == torch.bfloat16 else values,
        rows,
        columns,
        scales.shape[1],
        *_halves(key or 0),
        IS_RANDOM=key is not None,
        GROUP=group,
        ROWS=tile_rows,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
