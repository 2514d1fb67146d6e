"""The checksum of packed parts: as its docstring says, the same by every way, and blind to no change."""

import pytest
import torch

from ssdtune.kernels.checksum import checksum
from ssdtune.kernels.native import library

native = library()
SUFFIXES = ("", *(native.suffixes if native is not None else ()))
SIZES = (0, 1, 3, 255, 256, 257, 1024, 1300, 256 * 9 + 17, 256 * 64, 256 * 65 + 1)


def plain(content: bytes) -> int:
    """The docstring of checksum.py in Python's own numbers."""

    def mix(value: int, word: int, factor: int, shift: int, bits: int) -> int:
        product = (value ^ word) * factor % 2**bits
        return product ^ product >> shift

    def taken(lanes: list[int], row: list[int]) -> list[int]:
        return [mix(h, w, 0x9E3779B1, 15, 32) for h, w in zip(lanes, row, strict=True)]

    whole = list(range(1, 65))
    for start in range(0, len(content), 64 * 256):
        block = content[start : start + 64 * 256]
        lanes = list(range(1, 65))
        for at in range(0, len(block), 256):
            row = block[at : at + 256].ljust(256, b"\0")
            lanes = taken(
                lanes, [int.from_bytes(row[i : i + 4], "little") for i in range(0, 256, 4)]
            )
        whole = taken(whole, lanes)
    found = len(content)
    for lane in whole:
        found = mix(found, lane, 0x9E3779B97F4A7C15, 32, 64)
    return found


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
    memory = content(256 * 64 * 300 + 5)  # more blocks than torch takes at a time
    assert len({checksum(memory, suffix=suffix) for suffix in SUFFIXES}) == 1


def test_every_flipped_bit_is_found() -> None:
    memory = content(700)
    before = checksum(memory)
    for bit in range(0, 5600, 7):
        memory[bit // 8] ^= 1 << bit % 8
        assert checksum(memory) != before
        memory[bit // 8] ^= 1 << bit % 8
    assert checksum(memory) == before


@pytest.mark.parametrize("bit", range(8))
def test_a_bit_that_is_stuck_everywhere_is_found(bit: int) -> None:
    """The same bit of words that share a lane: sums of products would not see the highest."""
    memory = content(256 * 40)
    before = checksum(memory)
    for first in (3, 255):
        for rows in (2, 5, 39):
            damaged = memory.clone()
            damaged[first : first + 256 * rows : 256 * (rows - 1)] ^= 1 << bit
            assert (damaged != memory).sum() == 2
            assert checksum(damaged) != before


def test_zeros_at_the_end_count() -> None:
    memory = content(300)
    longer = torch.nn.functional.pad(memory, (0, 1))
    assert checksum(longer) != checksum(memory)
