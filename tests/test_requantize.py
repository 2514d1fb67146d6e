"""Codes that take a step and are rounded at random: as stated, unbiased, the same bits whoever does it."""

import math

import pytest
import torch
from test_unpack import SUFFIXES, packed

from ssdtune.kernels import philox
from ssdtune.kernels import requantize as module
from ssdtune.kernels.affine import ORDERS, Affine, join_slices, pack_slice
from ssdtune.kernels.noise import RADEMACHER, TILE, Direction
from ssdtune.kernels.requantize import move_codes, requantize
from ssdtune.kernels.unpack_add import Move

FORMATS = (
    *(Affine(bits, order) for bits, order in ORDERS.items()),
    *(Affine(bits, (4, 1, 1, 2), 32) for bits in (4, 5, 6)),
    Affine(2, (2, 1, 1, 2, 2), 128),
    Affine(8, (8,), 128),
)
MOVES = (
    Move((Direction(5, 1e-2),), 1.0, 77),
    Move((Direction(6, -2e-3, RADEMACHER), Direction(9, 1e-3)), 0.99, 2**63 + 5),
    Move((), 0.5, 3),
)
KEY = 2**63 + 12345


def moved(format: Affine, size: int, move: Move, suffix: str, *, any_scale: bool) -> torch.Tensor:
    """All bytes of the parts after the step."""
    parts = packed(format, size, any_scale=any_scale)
    requantize(format, parts, (size,), move, suffix=suffix)
    return torch.cat([part.view(torch.uint8).reshape(-1) for part in parts])


@pytest.mark.skipif(not SUFFIXES, reason="there is no compiler here")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.label} {format.order}")
def test_native_code_has_the_bits_of_its_definition(format: Affine, suffix: str) -> None:
    for size in (1, 1000, 3 * TILE + 77):
        for move in MOVES:
            for any_scale in (False, True):
                expected = moved(format, size, move, "", any_scale=any_scale)
                found = moved(format, size, move, suffix, any_scale=any_scale)
                assert torch.equal(found, expected), (size, move)


def test_threads_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = moved(FORMATS[3], 20 * TILE + 3, MOVES[0], "", any_scale=False)
    monkeypatch.setattr(module, "NATIVE_PART", TILE)
    for suffix in SUFFIXES:
        assert torch.equal(
            moved(FORMATS[3], 20 * TILE + 3, MOVES[0], suffix, any_scale=False), expected
        )


def parts_with(code: int, size: int, *, bits: int = 4, scale: float = 0.25) -> list[torch.Tensor]:
    """One code everywhere; z = 7.46875."""
    codes = torch.full((size,), code, dtype=torch.uint8)
    groups = -(-size // 64)
    return [
        pack_slice(codes, bits),
        torch.full((groups,), scale, dtype=torch.bfloat16),
        torch.full((groups,), 127, dtype=torch.uint8),
    ]


def codes_after(
    by: float, code: int = 5, *, size: int = 1 << 18, scale: float = 0.25
) -> torch.Tensor:
    parts = parts_with(code, size, scale=scale)
    move_codes(Affine(4, (4,)), parts, torch.full((size,), by), KEY)
    return join_slices(parts[:1], (4,))[:size].double()


@pytest.mark.parametrize("steps", [0.25, -0.25, 1.75, 1e-3, -1e-3, -2.6])
def test_a_code_is_moved_by_the_right_amount_on_average(steps: float) -> None:
    """Between the two nearest codes, so that its mean is the moved weight: within five standard errors."""
    found = codes_after(steps * 0.25)
    assert set(found.unique().tolist()) == {5 + math.floor(steps), 5 + math.floor(steps) + 1}
    share = steps - math.floor(steps)
    bound = 5 * math.sqrt(share * (1 - share) / found.numel())
    assert abs(found.mean() - 5 - steps) < bound


def test_steps_far_smaller_than_a_code_add_up() -> None:
    """1e-5 of a code: where 16 random bits would move none up, or too many down."""
    total = 0.0
    for sign in (1, -1):
        for key in range(4):
            parts = parts_with(5, 1 << 18)
            move_codes(Affine(4, (4,)), parts, torch.full((1 << 18,), sign * 2.5e-6), key)
            total += abs(float((join_slices(parts[:1], (4,)).double() - 5).sum()))
    expected = 8 * (1 << 18) * 1e-5
    assert abs(total - expected) < 5 * math.sqrt(expected)


def test_no_step_changes_no_code() -> None:
    format = Affine(8, (4, 1, 1, 2))
    parts = packed(format, 5000)
    before = [part.clone() for part in parts]
    requantize(format, parts, (5000,), Move((), 1.0, KEY))
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


def test_codes_end_at_the_first_and_the_last() -> None:
    assert codes_after(100.0).eq(15).all()
    assert codes_after(-1e30).eq(0).all()
    assert codes_after(math.inf).eq(15).all()
    assert codes_after(math.nan).eq(5).all(), "what is no number moves nothing"
    assert codes_after(0.0, scale=0.0).eq(5).all()


def test_only_the_codes_that_are_read_are_written() -> None:
    """Of nested slices the first ones; scales, zeros and padding stay."""
    format = Affine(5, (4, 1, 1, 2))
    parts = [*packed(Affine(8, (4, 1, 1, 2)), 1000)[:4], *packed(format, 1000)[2:]]
    before = [part.clone() for part in parts]
    requantize(format, [*parts[:2], *parts[4:]], (1000,), MOVES[0])
    changed = [not torch.equal(a, b) for a, b in zip(parts, before, strict=True)]
    assert changed == [True, True, False, False, False, False]
    past = [join_slices(made[:2], (4, 1))[1000:] for made in (parts, before)]
    assert torch.equal(*past)


def test_rounding_has_numbers_of_its_own() -> None:
    cpu = torch.device("cpu")
    found = [philox.fields(KEY, 0, 64, bits=32, domain=d, device=cpu) for d in (0, 1, philox.CODES)]
    assert not torch.equal(found[2], found[0])
    assert not torch.equal(found[2], found[1])
