"""ggml's types decoded on a GPU: the Triton twin of what ggml.py defines, bit for bit.

A program takes chunks of 256 elements, a block of the K kinds or eight of the others, as *runs* that share a scale. A
part may begin at any byte: bytes are loaded one by one. (Nothing has run on a GPU yet.)
"""

# Kernels are in Triton's language, which looks like Python and has other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from ssdtune.kernels.ggml import IQ4, KINDS, Ggml
from ssdtune.kernels.unpack_triton import _store, _table_on

CHUNKS = 16  # of one program
WARPS = 4
# Elements of a run. Kinds that are not here, plain floats, torch decodes.
RUNS = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"), 32),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q6_K"), 16),
    **dict.fromkeys(("Q4_K", "Q5_K", "IQ4_XS"), 32),
}


@triton.jit
def _byte(at, is_there):
    return tl.load(at, mask=is_there, other=0).to(tl.int32)


@triton.jit
def _signed(byte):
    """Of a byte of two's complement, float32."""
    return ((byte ^ 128) - 128).to(tl.float32)


@triton.jit
def _half(at, is_there):
    """The float16 in two bytes, as float32."""
    bits = _byte(at, is_there) | (_byte(at + 1, is_there) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nibble(at, i, is_there):
    """The code of four bits of element i in 16 bytes: the lower halves come first."""
    return (_byte(at + i % 16, is_there) >> (i // 16 * 4)) & 15


@triton.jit
def _fifth(at, i, is_there):
    """The bit above a nibble of element i, from 32 of them."""
    return ((_byte(at + i // 8, is_there) >> (i % 8)) & 1) << 4


@triton.jit
def _scale_and_minimum(block, run, is_there):
    """As `ggml.scales_and_mins` of bytes 4-15, times the block's two float16."""
    at = block + 4 + run
    here, later = _byte(at, is_there), _byte(at + 4, is_there)
    before = _byte(tl.where(run < 4, at, at - 4), is_there)
    scale = tl.where(run < 4, here & 63, (later & 15) | (before >> 6 << 4))
    minimum = tl.where(run < 4, later & 63, (later >> 4) | (here >> 6 << 4))
    scale = _half(block, is_there) * scale.to(tl.float32)
    return scale, _half(block + 2, is_there) * minimum.to(tl.float32)


@triton.jit
def _e2m1(block, i, is_there):
    """Blocks of MXFP4: w of element i. The table is doubled and the scale halved, as `ggml._mxfp4` has them."""
    exponent = _byte(block, is_there)
    bits = tl.where(exponent < 2, 0x00200000 << tl.minimum(exponent, 1), (exponent - 1) << 23)
    code = _nibble(block + 1, i, is_there)
    size = code & 7
    size = tl.where(size < 2, size, (2 + (size & 1)) << (tl.maximum(size >> 1, 1) - 1))
    size = tl.where(code > 7, -size, size)
    return size.to(tl.float32) * bits.to(tl.float32, bitcast=True)


@triton.jit
def _small(block, i, table, is_there, KIND: tl.constexpr):
    """Blocks of 32: w of element i."""
    scale = _half(block, is_there)
    if KIND == "Q8_0":
        value = _signed(_byte(block + 2 + i, is_there)) * scale
    elif KIND == "IQ4_NL":
        value = tl.load(table + _nibble(block + 2, i, is_there)) * scale
    elif KIND == "Q4_0":
        value = (_nibble(block + 2, i, is_there) - 8).to(tl.float32) * scale
    elif KIND == "Q5_0":
        code = _nibble(block + 6, i, is_there) | _fifth(block + 2, i, is_there)
        value = (code - 16).to(tl.float32) * scale
    else:
        if KIND == "Q5_1":
            code = _nibble(block + 8, i, is_there) | _fifth(block + 4, i, is_there)
        else:
            code = _nibble(block + 4, i, is_there)
        value = code.to(tl.float32) * scale + _half(block + 2, is_there)
    return value


@triton.jit
def _of_16(block, run, i, is_there, KIND: tl.constexpr):
    """Blocks of 256 in runs of 16: w of element i of a run."""
    half, within = run // 8, run % 8
    # Where two bits of 128 elements lie in 32 bytes: which byte, and how far up.
    at, up = half * 32 + within % 2 * 16 + i, within // 2 * 2
    if KIND == "Q6_K":
        low = _byte(block + half * 64 + within % 4 * 16 + i, is_there) >> (within // 4 * 4)
        high = _byte(block + 128 + at, is_there) >> up
        code = (low & 15) | ((high & 3) << 4)
        scale = _half(block + 208, is_there) * _signed(_byte(block + 192 + run, is_there))
        value = (code - 32).to(tl.float32) * scale
    elif KIND == "Q3_K":
        third = (_byte(block + run % 2 * 16 + i, is_there) >> (run // 2)) & 1
        code = ((_byte(block + 32 + at, is_there) >> up) & 3) | (third << 2)
        low = (_byte(block + 96 + within, is_there) >> (half * 4)) & 15
        high = (_byte(block + 104 + run % 4, is_there) >> (run // 4 * 2)) & 3
        scale = _half(block + 108, is_there) * ((low | (high << 4)) - 32).to(tl.float32)
        value = (code - 4).to(tl.float32) * scale
    else:  # Q2_K
        code = (_byte(block + 16 + at, is_there) >> up) & 3
        both = _byte(block + run, is_there)
        scale = _half(block + 80, is_there) * (both & 15).to(tl.float32)
        minimum = _half(block + 82, is_there) * (both >> 4).to(tl.float32)
        value = code.to(tl.float32) * scale - minimum
    return value


@triton.jit
def _of_32(block, run, i, table, is_there, KIND: tl.constexpr):
    """Blocks of 256 in runs of 32: w of element i of a run."""
    if KIND == "IQ4_XS":
        low = (_byte(block + 4 + run // 2, is_there) >> (run % 2 * 4)) & 15
        high = (_byte(block + 2 + run // 4, is_there) >> (run % 4 * 2)) & 3
        scale = _half(block, is_there) * ((low | (high << 4)) - 32).to(tl.float32)
        value = tl.load(table + _nibble(block + 8 + run * 16, i, is_there)) * scale
    else:
        at = block + 16 + run // 2 * 32 + i
        shift = run % 2 * 4
        if KIND == "Q5_K":  # 32 bytes of fifth bits lie before the nibbles
            fifth = (_byte(block + 16 + i, is_there) >> run) & 1
            code = ((_byte(at + 32, is_there) >> shift) & 15) | (fifth << 4)
        else:
            code = (_byte(at, is_there) >> shift) & 15
        scale, minimum = _scale_and_minimum(block, run, is_there)
        value = code.to(tl.float32) * scale - minimum
    return value


@triton.jit
def _ggml(
    to, blocks, table, num_elements,
    KIND: tl.constexpr, BLOCK: tl.constexpr, NUM_BYTES: tl.constexpr, RUN: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """to = w. A program takes CHUNKS chunks. table: what nibbles of the IQ kinds stand for."""
    chunk = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)[:, None, None]
    run = tl.arange(0, 256 // RUN)[None, :, None]
    i = tl.arange(0, RUN)[None, None, :]
    first = chunk * 256 + run * RUN
    is_there = first < num_elements
    block = blocks + first // BLOCK * NUM_BYTES
    if KIND == "MXFP4":
        value = _e2m1(block, i, is_there)
    elif BLOCK == 32:
        value = _small(block, i, table, is_there, KIND)
    elif RUN == 16:
        value = _of_16(block, run, i, is_there, KIND)
    else:
        value = _of_32(block, run, i, table, is_there, KIND)
    _store(to + first + i, value, is_there)


def decode_ggml(format: Ggml, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """As `Ggml.by_torch`. out: on the GPU."""
    if format.kind not in RUNS:
        format.by_torch(parts, out)
        return
    _, block, num_bytes, _ = KINDS[format.kind]
    flat = out.view(-1)
    _ggml[(-(-flat.numel() // (256 * CHUNKS)),)](
        flat.view(torch.int16) if out.dtype == torch.bfloat16 else flat,
        parts[0],
        _table_on(flat.device, IQ4) if format.kind.startswith("IQ4") else None,
        flat.numel(),
        KIND=format.kind,
        BLOCK=block,
        NUM_BYTES=num_bytes,
        RUN=RUNS[format.kind],
        CHUNKS=CHUNKS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


DECODERS: dict[type, Callable[..., None]] = {Ggml: decode_ggml}
