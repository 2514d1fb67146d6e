"""Random bits that depend on nothing but a key and a position: Philox4x32-10, and which bits are whose.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). One counter gives 128 bits. Here a
*field* of `bits` bits (1, 8, 16 or 32) belongs to each element of a tensor, numbered in its logical, row-major order:

    fields of one counter   F = 128 / bits
    tile                    64 x F elements, made from 64 counters
    element i               tile t = i // (64 F), field j = (i // 64) % F, lane l = i % 64
    its field               bits [bits j, bits j + bits) of the output of counter (64 t + l, domain), little-endian

So 64 neighbours take the same field of 64 neighbouring counters: every vector unit, and a GPU, makes them side by
side, and any part of a tensor can be made alone. This file is the definition, in torch; `noise.c` is its fast twin.
"""

from __future__ import annotations

import functools
import hashlib

import torch

LANES = 64
COUNTER_BITS = 128
ROUNDS = 10
MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by in each round

# Domains: the third counter word. Streams of one key that must have nothing to do with each other.
DIRECTION, ROUNDING, CODES = 0, 1, 2


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The four output words of one counter. All words are 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (high >> 32) ^ c1 ^ k0,
            high & MASK,
            (low >> 32) ^ c3 ^ k1,
            low & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def key_of(seed: int, *numbers: int) -> int:
    """A key of 64 bits for a seed and numbers of 64 bits each: their BLAKE2b digest, all little-endian. Whoever has
    them can make it again."""
    packed = b"".join(n.to_bytes(8, "little") for n in (seed, *numbers))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


@functools.cache
def number_of(name: str) -> int:
    """64 bits that stand for a parameter's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def tile_size(bits: int) -> int:
    """Elements that 64 counters serve."""
    return LANES * COUNTER_BITS // bits


def fields(
    key: int, first: int, num_elements: int, *, bits: int, domain: int, device: torch.device
) -> torch.Tensor:
    """The fields of elements first … first + num_elements - 1, int64 [num_elements].

    key: 64 bits. first: a multiple of `tile_size(bits)`.
    """
    tile = tile_size(bits)
    assert first % tile == 0
    num_tiles = -(-num_elements // tile)
    start = first // tile * LANES
    words = _words(key, start, num_tiles * LANES, domain, device)  # [4, counters]
    words = words.view(4, num_tiles, LANES).transpose(0, 1)  # [tiles, 4, lanes]
    shifts = torch.arange(0, 32, bits, device=device).view(1, 1, -1, 1)
    found = (words.unsqueeze(2) >> shifts) & (
        (1 << bits) - 1
    )  # [tiles, 4, fields of a word, lanes]
    return found.reshape(-1)[:num_elements]


def _words(
    key: int, start: int, num_counters: int, domain: int, device: torch.device
) -> torch.Tensor:
    """Output words of neighbouring counters, int64 [4, num_counters]. Products wrap around in int64; their bits are
    right."""
    counters = torch.arange(start, start + num_counters, dtype=torch.int64, device=device)
    c0, c1 = counters & MASK, counters >> 32 & MASK
    c2, c3 = torch.full_like(c0, domain), torch.zeros_like(c0)
    k0, k1 = key & MASK, key >> 32 & MASK
    for _ in range(ROUNDS):
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high >> 32 & MASK) ^ c1 ^ k0,
            high & MASK,
            (low >> 32 & MASK) ^ c3 ^ k1,
            low & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return torch.stack((c0, c1, c2, c3))
