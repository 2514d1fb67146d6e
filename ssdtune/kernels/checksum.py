"""A checksum that is as fast as memory: is a packed part what was written?

The bytes, filled up with zeros to whole rows of 256, are rows of 64 words of 32 bits, the lower byte first. Modulo 2^32:

    sum of a lane    h = h * 0x9E3779B1 + word, row by row, from 0
    half of the sum  s = s * m + h, lane by lane, from 0; then s = s * m + number of bytes (its lower 32 bits)

with m = 0x9E3779B1 for the lower and 0x85EBCA77 for the upper half of 64 bits. The multipliers are odd, so that a change
of one word changes every product after it: it is always found, whatever the change. It is no protection against
somebody who wants two contents to agree.
"""

from __future__ import annotations

import ctypes

import torch

from ssdtune.kernels.native import library

LANES = 64
ROW = 4 * LANES  # bytes
MULTIPLIER, UPPER_MULTIPLIER = 0x9E3779B1, 0x85EBCA77
MASK = 0xFFFFFFFF
TOGETHER = 4  # rows, of checksum.c
CHUNK_ROWS = 4096  # that torch's operators take at a time


def checksum(memory: torch.Tensor, *, suffix: str | None = None) -> int:
    """64 bits. memory: uint8, contiguous, on the CPU. suffix: of the native function; None: the best; "": torch."""
    assert memory.dtype == torch.uint8, memory.dtype
    assert memory.is_contiguous()
    flat = memory.view(-1)
    num_bytes = flat.numel()
    num_rows, left = divmod(num_bytes, ROW)
    native = library()
    if suffix is None:
        suffix = "" if native is None else native.suffixes[0]
    sums = torch.zeros(LANES, dtype=torch.int32)
    for part, rows in (
        (flat[: num_rows * ROW], num_rows),
        (torch.nn.functional.pad(flat[num_rows * ROW :], (0, ROW - left)), 1 if left else 0),
    ):
        if not rows:
            continue
        if suffix:
            assert native is not None
            factors = (ctypes.c_uint32 * TOGETHER)(*_powers(TOGETHER))
            native.function("ssdtune_checksum", suffix)(
                ctypes.c_void_p(sums.data_ptr()),
                ctypes.c_void_p(part.data_ptr()),
                ctypes.c_int64(rows),
                factors,
            )
        else:
            sums = _by_torch(sums, part)
    lanes = [lane & MASK for lane in sums.tolist()]
    return _half(lanes, num_bytes, UPPER_MULTIPLIER) << 32 | _half(lanes, num_bytes, MULTIPLIER)


def _half(lanes: list[int], num_bytes: int, multiplier: int) -> int:
    found = 0
    for value in (*lanes, num_bytes):
        found = (found * multiplier + value) & MASK
    return found


def _powers(count: int) -> list[int]:
    """The multiplier to the powers 1 … count."""
    return [pow(MULTIPLIER, k, 1 << 32) for k in range(1, count + 1)]


def _by_torch(sums: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Sums of the lanes after some whole rows, int32. In int64, whose products wrap around modulo 2^64 and so are right
    modulo 2^32."""
    words = part.clone().view(torch.int32).view(-1, LANES)  # a copy: it may lie unaligned
    total = sums.long()
    for first in range(0, len(words), CHUNK_ROWS):
        rows = words[first : first + CHUNK_ROWS].long()
        powers = torch.tensor([1, *_powers(len(rows))], dtype=torch.int64).flip(0)
        total = total * powers[0] + (rows * powers[1:].unsqueeze(1)).sum(0)
        total = total & MASK
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()
