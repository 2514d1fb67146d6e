"""x W^T for a few tokens, W packed: on a GPU the weights are read packed and never written unpacked.

W [rows, columns] is `Affine`, columns a multiple of 64. Each weight is rounded as `unpack` rounds it into x's dtype.
Sums are float32, in an order that depends on shapes alone, so that a device gives the same bits each time:

    a step       64 columns (32 where groups are 32): within it as the device's matrix unit adds
    a part       16 steps, the first to the last
    the result   parts, the first to the last

It differs from the exact sum by at most columns x 2^-23 x sum |x w|. Rows need not begin with a tile: a byte is loaded
again for each vector that it has a field of, from the cache next to the cores. Nothing calls it yet: docs/design.md says
why. (Nothing has run on a GPU yet.)
"""

# Kernels are in Triton's language, which looks like Python and has other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ssdtune.kernels.affine import LANES, Affine
from ssdtune.kernels.noise_triton import _float_of, _nearest
from ssdtune.kernels.unpack_triton import _dequantized, _scale_and_zero

MOST_TOKENS = 16  # the narrowest matrix that matrix units take
ROWS = 32  # of one program
STEPS = 16  # of a part
SUMS = 1024  # that a program adds parts for


@triton.jit
def _codes(slices, element, lane, is_there, WIDTHS: tl.constexpr):
    """q of elements of one vector in each row, uint32 [rows, lanes]. element: the number of any of them, int64."""
    code = tl.full((1, 1), 0, tl.uint32)
    for i in tl.static_range(len(WIDTHS)):
        code = (code << WIDTHS[i]) | _field(slices[i], element, lane, is_there, WIDTHS[i])
    return code


@triton.jit
def _field(packed, element, lane, is_there, WIDTH: tl.constexpr):
    """What a slice has of them."""
    FIELDS: tl.constexpr = 8 // WIDTH
    vector = element // 64
    byte = tl.load(packed + vector // FIELDS * 64 + lane, mask=is_there).to(tl.uint32)
    return (byte >> (vector % FIELDS * WIDTH).to(tl.uint32)) & (2**WIDTH - 1)


@triton.jit
def _multiply(
    to, x, slices, scales, zeros, num_tokens, num_rows, num_columns,
    BITS: tl.constexpr, WIDTHS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    IS_BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the sums of ROWS rows. to: float32 [parts, tokens, rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    column = tl.arange(0, SPAN)
    first = tl.program_id(1) * STEPS
    last = tl.minimum(first + STEPS, num_columns // SPAN)
    total = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    for step in range(first, last):
        element = row * num_columns + step * SPAN
        scale, zero = _scale_and_zero(scales, zeros, element // GROUP, row < num_rows, BITS)
        lane = element % 64 + column[None, :]
        code = _codes(slices, element, lane, row < num_rows, WIDTHS)
        weight = _dequantized(code, scale, zero)
        at = token * num_columns + step * SPAN + column[:, None]
        value = tl.load(x + at, mask=token < num_tokens, other=0)
        if IS_BF16:
            weight, value = _float_of(_nearest(weight)), _float_of(value)
        total = tl.dot(weight, value, total, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * num_tokens + token) * num_rows + row
    tl.store(to + at, total, mask=(token < num_tokens) & (row < num_rows))


@triton.jit
def _add_parts(to, parts, num_sums, num_parts, SUMS: tl.constexpr):
    """to [sums] = parts [parts, sums], added from the first to the last."""
    at = tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, SUMS)
    is_there = at < num_sums
    total = tl.load(parts + at, mask=is_there)
    for part in range(1, num_parts):
        total += tl.load(parts + part * num_sums + at, mask=is_there)
    tl.store(to + at, total, mask=is_there)


def matmul_triton(
    format: Affine, parts: Sequence[torch.Tensor], x: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """x W^T, float32 [tokens, rows].

    parts: of W [num_rows, columns], as `format.parts` says, contiguous, on x's device. x: [tokens, columns], contiguous,
    float32 or bfloat16, at most MOST_TOKENS tokens.
    """
    num_tokens, num_columns = x.shape
    is_bf16 = x.dtype == torch.bfloat16
    assert is_bf16 or x.dtype == torch.float32, x.dtype
    assert num_tokens <= MOST_TOKENS, num_tokens
    assert num_columns % LANES == 0, num_columns
    *slices, scales, zeros = parts
    span = min(format.group, LANES)
    num_parts = -(-num_columns // (span * STEPS))
    sums = x.new_empty((num_parts, num_tokens, num_rows), dtype=torch.float32)
    _multiply[(-(-num_rows // ROWS), num_parts)](
        sums,
        x.view(torch.int16) if is_bf16 else x,
        tuple(slices),
        scales.view(torch.int16),
        zeros,
        *(num_tokens, num_rows, num_columns),
        BITS=format.bits,
        WIDTHS=format.slices,
        GROUP=format.group,
        SPAN=span,
        TOKENS=MOST_TOKENS,
        ROWS=ROWS,
        STEPS=STEPS,
        IS_BF16=is_bf16,
        # A bfloat16 is a TF32 number, and the product of two is exact; a float32 is none.
        PRECISION="tf32" if is_bf16 and torch.version.hip is None else "ieee",
        enable_fp_fusion=False,
    )
    if num_parts == 1:
        return sums[0]
    to = torch.empty_like(sums[0])
    _add_parts[(-(-to.numel() // SUMS),)](to, sums, to.numel(), num_parts, SUMS=SUMS)
    return to
