"""Rotated groups decoded on a GPU: the Triton twin of what rotated.py defines, bit for bit.

A program takes whole groups, a row of a tensor each; sums and differences are of that tensor's halves, cut anew in each
stage. (Nothing has run on a GPU yet.)
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

from ssdtune.kernels.matmul_triton import _codes
from ssdtune.kernels.rotated import Rotated
from ssdtune.kernels.unpack_triton import _dequantized, _scale_and_zero, _store

ELEMENTS = 2048  # of one program
WARPS = 4


@triton.jit
def _stage(values, GROUPS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr):
    """Of elements HALF apart the sum and the difference, in their places."""
    pairs = tl.reshape(values, (GROUPS, GROUP // (2 * HALF), 2, HALF))
    first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    pairs = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
    return tl.reshape(pairs, (GROUPS, GROUP))


@triton.jit
def _rotated(
    to, slices, scales, zeros, num_elements,
    BITS: tl.constexpr, WIDTHS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    ROOT: tl.constexpr,
):  # fmt: skip
    """to = H v / sqrt(n). A program takes GROUPS groups."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    element = group * GROUP + tl.arange(0, GROUP)[None, :]
    is_there = element < num_elements
    scale, zero = _scale_and_zero(scales, zeros, group, group * GROUP < num_elements, BITS)
    code = _codes(slices, element, element % 64, is_there, WIDTHS)
    values = _dequantized(code, scale, zero)
    turned = values
    turned = _stage(turned, GROUPS, GROUP, 1)
    turned = _stage(turned, GROUPS, GROUP, 2)
    turned = _stage(turned, GROUPS, GROUP, 4)
    turned = _stage(turned, GROUPS, GROUP, 8)
    turned = _stage(turned, GROUPS, GROUP, 16)
    if GROUP > 32:
        turned = _stage(turned, GROUPS, GROUP, 32)
    if GROUP > 64:
        turned = _stage(turned, GROUPS, GROUP, 64)
    is_whole = (group + 1) * GROUP <= num_elements
    _store(to + element, tl.where(is_whole, turned * ROOT, values), is_there)


def decode_rotated(format: Rotated, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """As `Rotated.by_torch`. out: on the GPU."""
    *slices, scales, zeros = parts
    flat, stored = out.view(-1), format.stored
    _rotated[(-(-flat.numel() // ELEMENTS),)](
        flat.view(torch.int16) if out.dtype == torch.bfloat16 else flat,
        tuple(slices),
        scales.view(torch.int16),
        zeros,
        flat.numel(),
        BITS=stored.bits,
        WIDTHS=stored.slices,
        GROUP=stored.group,
        GROUPS=ELEMENTS // stored.group,
        ROOT=stored.group**-0.5,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
