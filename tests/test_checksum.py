"""The checksum of packed parts: as its docstring says, the same by every way, and blind to no change."""

import pytest
import torch

from ssdtune.kernels.checksum import checksum
from ssdtune.kernels.native import library

native = library()
SUFFIXES = ("", *(native.suffixes if native is not None else ()))
SIZES = (0, 1, 3, 255, 256, 257, 1024, 1300, 256 * 9 + 17)


def plain(content: bytes) -> int:
    """The docstring of checksum.py in Python's own numbers."""
    padded = content + bytes(-len(content) % 256)
    lanes = [0] * 64
    for at in range(0, len(padded), 4):
        lane = at // 4 % 64
        word = int.from_bytes(padded[at : at + 4], "little")
        lanes[lane] = (lanes[lane] * 0x9E3779B1 + word) % 2**32
    halves: list[int] = []
    for multiplier in (0x85EBCA77, 0x9E3779B1):
        found = 0
        for value in (*lanes, len(content)):
            found = (found * multiplier + value) % 2**32
        halves.append(found)
    return halves[0] << 32 | halves[1]


def content(num_bytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_bytes)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("num_bytes", SIZES)
def test_it_is_what_its_docstring_says(num_bytes: int, suffix: str) -> None:
    memory = content(num_bytes)
    assert checksum(memory, suffix=suffix) == plain(bytes(memory.tolist()))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_it_may_begin_anywhere(suffix: str) -> None:
    memory = content(3000)
    for first in (1, 2, 7):
        expected = plain(bytes(memory[first:].tolist()))
        assert checksum(memory[first:], suffix=suffix) == expected


def test_large_contents_are_the_same_by_every_way() -> None:
    memory = content(256 * 9000 + 5)  # more rows than torch takes at a time
    assert len({checksum(memory, suffix=suffix) for suffix in SUFFIXES}) == 1


def test_every_flipped_bit_is_found_in_both_halves() -> None:
    memory = content(700)
    before = checksum(memory)
    for bit in range(0, 5600, 7):
        memory[bit // 8] ^= 1 << bit % 8
        after = checksum(memory)
        assert after & 0xFFFFFFFF != before & 0xFFFFFFFF
        assert after >> 32 != before >> 32
        memory[bit // 8] ^= 1 << bit % 8
    assert checksum(memory) == before


def test_zeros_at_the_end_count() -> None:
    memory = content(300)
    longer = torch.nn.functional.pad(memory, (0, 1))
    assert checksum(longer) != checksum(memory)
