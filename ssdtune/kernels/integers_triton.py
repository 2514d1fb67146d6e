"""Other libraries' integer codes and FP8 decoded on a GPU: the Triton twin of integers.py and float8.py, bit for bit.

A program takes a tile of rows and columns. Where the words of a row lie one below the other (GPTQ, AWQ), neighbouring
threads take neighbouring rows, as the file has them, and the tile is turned before it is stored. A tile lies within one
group where groups are wide enough: its rows then have one zero and one scale each. (Nothing has run on a GPU yet.)
"""

# Kernels are in Triton's language, which looks like Python and has other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.scaled_rows import ACROSS, AWQ, FORMATS, FP8, INT8, Rows, Words, rows_of
from ssdtune.kernels.unpack_triton import _e4m3, _store

ELEMENTS = 4096  # of a tile
COLUMNS = 64  # of a tile, at most
WARPS = 4
BITS_OF = {torch.bfloat16: torch.int16}  # outputs whose bits are stored


@triton.jit
def _word_codes(codes, at, step, column, is_there, BITS: tl.constexpr):
    """Codes of streams, uint32. at: of each stream's first word; step: from there to its next one."""
    bit = column * BITS
    word = at + (bit // 32).to(tl.int64) * step
    shift = (bit % 32).to(tl.uint32)
    code = tl.load(codes + word, mask=is_there).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:  # may go on in the next word
        is_split = is_there & (shift + BITS > 32)
        rest = tl.load(codes + word + step, mask=is_split, other=0).to(tl.uint32, bitcast=True)
        code = code | (rest << tl.where(is_split, 32 - shift, 0))
    return code & (2**BITS - 1)


@triton.jit
def _values_of(codes, row, column, stride, is_there, BITS: tl.constexpr, LAYOUT: tl.constexpr):
    """What codes stand for before zero and scale, float32."""
    if (
        LAYOUT == 4
    ):  # FP8, as scaled_rows.py numbers them: this language knows no variables of a module
        value = _e4m3(tl.load(codes + row * stride + column, mask=is_there))
    elif LAYOUT == 3:  # INT8
        byte = tl.load(codes + row * stride + column, mask=is_there)
        value = byte.to(tl.int8, bitcast=True).to(tl.float32)
    elif LAYOUT == 2:  # AWQ
        word = tl.load(codes + column.to(tl.int64) * stride + row // 8, mask=is_there)
        place = row % 2 * 4 + row % 8 // 2
        code = (word.to(tl.uint32, bitcast=True) >> (4 * place).to(tl.uint32)) & 15
        value = code.to(tl.int32).to(tl.float32)
    elif LAYOUT == 1:  # ACROSS
        code = _word_codes(codes, row, stride, column, is_there, BITS)
        value = code.to(tl.int32).to(tl.float32)
    else:  # ALONG
        code = _word_codes(codes, row * stride, 1, column, is_there, BITS)
        value = code.to(tl.int32).to(tl.float32)
    return value


@triton.jit
def _scaled_rows(
    to, codes, zeros, scales, order, num_rows, width, stride, groups,
    GROUP: tl.constexpr, BITS: tl.constexpr, LAYOUT: tl.constexpr, IS_TURNED: tl.constexpr,
    IS_ONE_GROUP: tl.constexpr, HAS_ORDER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """to = (code - zero) scale, a tile of [ROWS, COLUMNS]. IS_TURNED: whether it is made as [COLUMNS, ROWS]."""
    first_row = tl.program_id(1).to(tl.int64) * ROWS
    first_column = tl.program_id(0) * COLUMNS
    if IS_TURNED:
        row = first_row + tl.arange(0, ROWS)[None, :]
        column = first_column + tl.arange(0, COLUMNS)[:, None]
    else:
        row = first_row + tl.arange(0, ROWS)[:, None]
        column = first_column + tl.arange(0, COLUMNS)[None, :]
    is_there = (row < num_rows) & (column < width)
    if HAS_ORDER:
        group = tl.load(order + column, mask=column < width, other=0)
        is_known = is_there & (group >= 0) & (group < groups)
    elif IS_ONE_GROUP:
        group = first_column // GROUP
        is_known = row < num_rows
    else:
        group = column // GROUP
        is_known = is_there
    at = row * groups + group
    zero = tl.load(zeros + at, mask=is_known)
    scale = tl.load(scales + at, mask=is_known)
    values = (_values_of(codes, row, column, stride, is_there, BITS, LAYOUT) - zero) * scale
    if IS_TURNED:
        values = tl.trans(values)
        row = first_row + tl.arange(0, ROWS)[:, None]
        column = first_column + tl.arange(0, COLUMNS)[None, :]
        is_there = (row < num_rows) & (column < width)
    _store(to + row * width + column, values, is_there)


def decode_rows(
    format: Words | ScaledBytes, parts: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """As `by_torch` of the formats, where a g_idx names groups that there are. out: on the GPU, float32, bfloat16 or
    float16."""
    for rows in rows_of(format, parts, out):
        _launch(rows)


def _launch(rows: Rows) -> None:
    num_rows, width = rows.out.shape
    groups = rows.scales.shape[1]
    is_byte = rows.layout in (INT8, FP8)
    group = rows.group if groups > 1 else width
    # Of one group, where groups are whole powers of two, or are all.
    columns = COLUMNS if groups == 1 else math.gcd(group, COLUMNS)
    is_one_group = rows.order is None and columns >= COLUMNS // 2
    columns = columns if is_one_group else COLUMNS
    tile_rows = ELEMENTS // columns
    kind = BITS_OF.get(rows.out.dtype, rows.out.dtype)
    _scaled_rows[(-(-width // columns), -(-num_rows // tile_rows))](
        rows.out.view(kind),
        rows.codes.view(torch.uint8) if is_byte else rows.codes,
        rows.zeros,
        rows.scales,
        rows.order,
        num_rows,
        width,
        rows.stride,
        groups,
        GROUP=group,
        BITS=rows.bits,
        LAYOUT=rows.layout,
        IS_TURNED=rows.layout in (ACROSS, AWQ),
        IS_ONE_GROUP=is_one_group,
        HAS_ORDER=rows.order is not None,
        ROWS=tile_rows,
        COLUMNS=columns,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


DECODERS: dict[type, Callable[..., None]] = dict.fromkeys(FORMATS, decode_rows)
