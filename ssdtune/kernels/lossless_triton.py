"""Lossless bfloat16 decoded on a GPU: the Triton twin of lossless.py, which defines every bit of it.

A program takes a chunk: its escapes stand from its offset on, one behind the other, so that each escape finds its own
by how many are before it. Nothing says here that parts are damaged, which would make the host wait: whatever they hold,
nothing outside them is read and nothing outside the output written.
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

from ssdtune.kernels.affine import ORDERS
from ssdtune.kernels.lossless import CHUNK, Lossless

WARPS = 8  # 16 elements a thread
BITS_OF = {torch.bfloat16: torch.int16, torch.float32: torch.int32}  # outputs whose bits are stored


@triton.jit
def _codes(slices, tile, within, is_there, WIDTHS: tl.constexpr):
    """Of elements `within` tiles, int32. Slices lie as affine.py has them."""
    code = tl.zeros(within.shape, tl.int32)
    group, lane = within // 64, within % 64
    for i in tl.static_range(len(WIDTHS)):
        vector, field = group // (8 // WIDTHS[i]), group % (8 // WIDTHS[i])
        at = (tile * WIDTHS[i] + vector) * 64 + lane
        byte = tl.load(slices[i] + at, mask=is_there, other=0).to(tl.int32)
        found = (byte >> (field * WIDTHS[i])) & (2 ** WIDTHS[i] - 1)
        code = (code << WIDTHS[i]) | found
    return code


@triton.jit
def _decode(
    to, lower, slices, dictionary, escapes, offsets, num_elements, num_escapes,
    CHUNK: tl.constexpr, WIDTHS: tl.constexpr, ESCAPE: tl.constexpr,
):  # fmt: skip
    """to: bits, int16 or int32; or float16."""
    chunk = tl.program_id(0).to(tl.int64)
    number = chunk * CHUNK + tl.arange(0, CHUNK)
    is_there = number < num_elements
    code = _codes(slices, number // 512, number % 512, is_there, WIDTHS)
    is_escape = (code == ESCAPE) & is_there
    known = tl.load(dictionary + code, mask=is_there & (code != ESCAPE), other=0)
    before = tl.cumsum(is_escape.to(tl.int32), 0) - 1
    at = tl.load(offsets + chunk).to(tl.int64) + before
    is_held = is_escape & (at >= 0) & (at < num_escapes)
    upper = tl.where(is_escape, tl.load(escapes + at, mask=is_held, other=0), known)
    value = (upper.to(tl.uint32) << 8) | tl.load(lower + number, mask=is_there, other=0)
    if to.dtype.element_ty == tl.int16:
        tl.store(to + number, value.to(tl.uint16).to(tl.int16, bitcast=True), mask=is_there)
    elif to.dtype.element_ty == tl.int32:
        tl.store(to + number, (value << 16).to(tl.int32, bitcast=True), mask=is_there)
    else:
        whole = (value << 16).to(tl.float32, bitcast=True)
        tl.store(to + number, whole.to(tl.float16), mask=is_there)


def decode_lossless(format: Lossless, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """As `Lossless.by_torch`, where the parts agree. out: on the GPU."""
    lower, *slices, dictionary, escapes, offsets = parts
    flat = out.view(-1)
    _decode[(-(-flat.numel() // CHUNK),)](
        flat.view(BITS_OF.get(out.dtype, out.dtype)),
        lower,
        tuple(slices),
        dictionary,
        escapes,
        offsets,
        flat.numel(),
        format.num_escapes,
        CHUNK=CHUNK,
        WIDTHS=ORDERS[format.bits],
        ESCAPE=format.escape,
        num_warps=WARPS,
    )
