"""ggml's usual types decoded on a GPU: the Triton twin of what ggml.py defines, bit for bit.

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

from ssdtune.kernels.ggml import KINDS, Ggml
from ssdtune.kernels.unpack_triton import _store

CHUNKS = 16  # of one program
WARPS = 4
# Elements of a run. Kinds that are not here torch decodes.
RUNS = {
    "Q4_0": 32, "Q4_1": 32, "Q8_0": 32, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16, "MXFP4": 32,
}  # fmt: skip


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
    code = (_byte(block + 1 + i % 16, is_there) >> (i // 16 * 4)) & 15
    size = code & 7
    size = tl.where(size < 2, size, (2 + (size & 1)) << (tl.maximum(size >> 1, 1) - 1))
    size = tl.where(code > 7, -size, size)
    return size.to(tl.float32) * bits.to(tl.float32, bitcast=True)


@triton.jit
def _small(block, i, is_there, KIND: tl.constexpr):
    """Blocks of 32: w of element i."""
    scale = _half(block, is_there)
    if KIND == "Q8_0":
        value = _signed(_byte(block + 2 + i, is_there)) * scale
    elif KIND == "Q4_0":
        code = (_byte(block + 2 + i % 16, is_there) >> (i // 16 * 4)) & 15
        value = (code - 8).to(tl.float32) * scale
    else:
        code = (_byte(block + 4 + i % 16, is_there) >> (i // 16 * 4)) & 15
        value = code.to(tl.float32) * scale + _half(block + 2, is_there)
    return value


@triton.jit
def _large(block, run, i, is_there, KIND: tl.constexpr):
    """Blocks of 256: w of element i of a run."""
    if KIND == "Q6_K":
        half, within = run // 8, run % 8
        low = _byte(block + half * 64 + within % 4 * 16 + i, is_there) >> (within // 4 * 4)
        high = _byte(block + 128 + half * 32 + within % 2 * 16 + i, is_there) >> (within // 2 * 2)
        code = (low & 15) | ((high & 3) << 4)
        scale = _half(block + 208, is_there) * _signed(_byte(block + 192 + run, is_there))
        value = (code - 32).to(tl.float32) * scale
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
    to, blocks, num_elements,
    KIND: tl.constexpr, BLOCK: tl.constexpr, NUM_BYTES: tl.constexpr, RUN: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """to = w. A program takes CHUNKS chunks."""
    chunk = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)[:, None, None]
    run = tl.arange(0, 256 // RUN)[None, :, None]
    i = tl.arange(0, RUN)[None, None, :]
    first = chunk * 256 + run * RUN
    is_there = first < num_elements
    block = blocks + first // BLOCK * NUM_BYTES
    if KIND == "MXFP4":
        value = _e2m1(block, i, is_there)
    elif BLOCK == 32:
        value = _small(block, i, is_there, KIND)
    else:
        value = _large(block, run, i, is_there, KIND)
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
