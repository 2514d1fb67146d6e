"""A checksum of memory, 64 bits, that reads about as fast as memory is read. Not against anyone who means harm.

    mix(h, w, P, s) = m xor (m >> s)        m = (h xor w) P, modulo 2^32 or 2^64

Memory is cut into blocks of 16 KiB, these into rows of 64 words of 32 bits, little-endian; the last row is filled up
with zeros. Each of a row's 64 places is a lane. A lane starts a block as its number, from 1 on, and takes word after word:
h = mix(h, word, 0x9E3779B1, 15). What lanes are at the end of a block, a row like any other, is taken by 64 lanes of the
whole memory in the same way. At last s, the number of bytes, takes these 64: s = mix(s, lane, 0x9E3779B97F4A7C15, 32).

P is odd, so that mix can be undone for either of its arguments: where a single word differs, so does every value from
there to the end, with certainty. Anything else goes unnoticed once in 2^32 times or less.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from ssdtune.kernels.native import library
from ssdtune.kernels.structs import struct

LANES = 64
ROW = 4 * LANES  # bytes
BLOCK = 64 * ROW  # bytes
FACTOR, SHIFT = 0x9E3779B1, 15
LAST_FACTOR, LAST_SHIFT = 0x9E3779B97F4A7C15, 32
CHUNK = 256  # blocks that torch's operators take at a time


def checksum(memory: torch.Tensor, *, suffix: str | None = None) -> int:
    """Of all bytes: an unsigned number of 64 bits.

    memory: uint8, one dimension, contiguous, on the CPU, at any address. suffix: of the native function; None: the best
    there is; "" for torch.
    """
    assert memory.dtype == torch.uint8, memory.dtype
    assert memory.is_contiguous()
    assert memory.device.type == "cpu"
    native = library() if suffix != "" else None
    if native is None:
        lanes = _by_torch(memory.reshape(-1))
    else:
        job = struct("checksum", "checksum.c")(memory.data_ptr(), memory.numel())
        native.function("ssdtune_checksum", suffix)(ctypes.c_void_p(ctypes.addressof(job)))
        lanes = list(job.total)
    return _joined(lanes, memory.numel())


def _joined(lanes: list[int], num_bytes: int) -> int:
    """The number of bytes and the lanes of the whole, as one."""
    result = num_bytes
    for lane in lanes:
        product = (result ^ lane) * LAST_FACTOR % 2**64
        result = product ^ product >> LAST_SHIFT
    return result


def _by_torch(memory: torch.Tensor) -> list[int]:
    """Lanes of the whole. Blocks side by side: the rows of one have to wait for each other."""
    total = _start()
    for first in range(0, memory.numel(), CHUNK * BLOCK):
        part = memory[first : first + CHUNK * BLOCK]
        whole = part.numel() // BLOCK * BLOCK
        for some in (part[:whole].view(-1, BLOCK), part[whole:].view(1, -1)):
            if some.numel():
                for lanes in _of_blocks(some):
                    total = _taken(total, lanes)
    return [lane % 2**32 for lane in total.tolist()]


def _of_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Lanes at the end of each block. blocks: uint8 [blocks, bytes of one]. Returns int32 [blocks, LANES]."""
    padded = torch.nn.functional.pad(blocks, (0, -blocks.shape[1] % ROW))
    rows = padded.clone().view(torch.int32).view(len(blocks), -1, LANES)  # a copy is aligned
    lanes = _start().expand(len(blocks), LANES)
    for row in rows.unbind(1):
        lanes = _taken(lanes, row)
    return lanes


def _taken(lanes: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """mix, for int32 that stand for unsigned numbers: products wrap, what is shifted in at the top is cut off."""
    product = (lanes ^ words) * (FACTOR - 2**32)
    return product ^ ((product >> SHIFT) & (2 ** (32 - SHIFT) - 1))


@functools.cache
def _start() -> torch.Tensor:
    return torch.arange(1, LANES + 1, dtype=torch.int32)
