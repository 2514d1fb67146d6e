"""Random directions: the published generator, the stated distribution, the same bits on every path."""

import math
from typing import Any

import pytest
import torch

from ssdtune.kernels import noise, philox, team
from ssdtune.kernels.native import library
from ssdtune.kernels.noise import (
    GAUSSIAN,
    KINDS,
    RADEMACHER,
    TILE,
    Direction,
    add_directions,
    add_low_rank,
    add_values,
)

KNOWN = [  # of the authors' own tests (Random123, kat_vectors: philox4x32 10)
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SIZES = (1, 63, 64, 1000, 1024, TILE - 1, TILE, TILE + 1, 3 * TILE + 77)


def native_suffixes() -> list[str]:
    found = library()
    return [] if found is None else list(found.suffixes)


def directions(kind: str) -> list[Direction]:
    return [Direction(0x0123456789ABCDEF, 1e-3, kind), Direction(77, -0.25, kind)]


def made(to_like: torch.Tensor, kind: str, suffix: str, **more: object) -> torch.Tensor:
    to = torch.empty_like(to_like)
    add_directions(to, to_like, directions(kind), suffix=suffix, **more)  # type: ignore[arg-type]
    return to


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_generator_is_the_published_one(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox.philox(counter, key) == expected


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_an_element_has_the_field_that_is_stated(bits: int) -> None:
    key, num_fields, tile = 0xFEDCBA9876543210, 128 // bits, philox.tile_size(bits)
    first, count = 5 * tile, 2 * tile + 5
    found = philox.fields(
        key, first, count, bits=bits, domain=philox.ROUNDING, device=torch.device("cpu")
    )
    for i in (0, 1, 63, 64, 65, tile - 1, tile, count - 1):
        number = first + i
        counter = 64 * (number // tile) + number % 64
        words = philox.philox(
            (counter & philox.MASK, counter >> 32, philox.ROUNDING, 0),
            (key & philox.MASK, key >> 32),
        )
        whole = sum(word << 32 * w for w, word in enumerate(words))
        field = number // 64 % num_fields
        assert found[i] == whole >> bits * field & (1 << bits) - 1


def test_counters_go_on_beyond_32_bits() -> None:
    first = philox.tile_size(8) * (2**32 // 64)  # its counter's low word is 0 again
    high, low = (
        philox.fields(3, at, 64, bits=8, domain=0, device=torch.device("cpu")) for at in (first, 0)
    )
    assert not torch.equal(high, low)


def test_gaussian_values_have_the_stated_moments() -> None:
    z = torch.tensor(Direction(0, 1.0).values(), dtype=torch.float64)
    assert len(z) == 256
    assert z.mean() == 0
    assert z.pow(2).mean() == pytest.approx(1, abs=1e-6)
    assert z.pow(4).mean() == pytest.approx(2.918, abs=1e-3)
    assert z.max() == pytest.approx(2.893, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_direction_looks_random(kind: str) -> None:
    """Mean, variance, and no neighbours that go together: each within five standard errors."""
    count = 1 << 20
    z = made(torch.zeros(count), kind, "") * 0
    add_directions(z, torch.zeros(count), [Direction(5, 1.0, kind)])
    other = torch.empty(count)
    add_directions(other, torch.zeros(count), [Direction(6, 1.0, kind)])
    bound = 5 / math.sqrt(count)
    assert abs(z.mean()) < bound
    assert abs(z.pow(2).mean() - 1) < 1.5 * bound
    for shift in (1, 64, 128, 1024):
        assert abs((z[shift:] * z[:-shift]).mean()) < bound
    assert abs((z * other).mean()) < bound


@pytest.mark.parametrize("suffix", native_suffixes())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_code_has_the_bits_of_its_definition(
    dtype: torch.dtype, kind: str, suffix: str
) -> None:
    for size in SIZES:
        base = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        for more in ({}, {"decay": 0.99}, {"rounding_key": 99, "decay": 1 - 1e-4}):
            assert same_bits(made(base, kind, "", **more), made(base, kind, suffix, **more))


@pytest.mark.parametrize("suffix", native_suffixes())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_counters_go_on_beyond_32_bits(dtype: torch.dtype, kind: str, suffix: str) -> None:
    """Across the place where a counter's low word is 0 again, and where its high word is not 0."""
    edge = philox.tile_size(noise.FIELD_BITS[kind]) * (2**32 // philox.LANES)
    base = torch.randn(2 * TILE + 77).to(dtype)
    at_0 = made(base, kind, suffix, rounding_key=99)
    for first in (edge - TILE, 4 * edge):
        found = made(base, kind, suffix, rounding_key=99, first=first)
        assert same_bits(found, made(base, kind, "", rounding_key=99, first=first))
        assert not same_bits(found, at_0)


@pytest.mark.parametrize("suffix", native_suffixes())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_native_values_and_factors_have_the_bits_of_their_definition(
    decay: float, dtype: torch.dtype, suffix: str
) -> None:
    for shape in [(1, 1), (3, 5000), (130, 577), (5, 3, 700)]:
        base, change = torch.randn(shape).to(dtype), torch.randn(shape)
        rows, columns = shape[0], base[0].numel()
        factors = [(torch.randn(rank, rows), torch.randn(rank, columns)) for rank in (1, 3)]
        for key in (None, 7):
            how: dict[str, Any] = {"decay": decay, "rounding_key": key}
            by_values, by_factors = ([torch.empty_like(base) for _ in range(2)] for _ in range(2))
            for which, to in zip(("", suffix), by_values, strict=True):
                add_values(to, base, change, **how, first=3 * TILE, suffix=which)
            for which, to in zip(("", suffix), by_factors, strict=True):
                add_low_rank(to, base, factors, **how, suffix=which)
            assert same_bits(*by_values)
            assert same_bits(*by_factors)
            assert not same_bits(by_values[0], base)
            assert not same_bits(by_factors[0], by_values[0])


@pytest.mark.parametrize("suffix", ["", *native_suffixes()])
def test_what_is_no_number_stays_so(suffix: str) -> None:
    base = torch.tensor([math.nan, math.inf, -math.inf, 3.3e38, -3.3e38]).bfloat16()
    for key in (None, 1):
        to = made(base, GAUSSIAN, suffix, rounding_key=key)
        assert to[0].isnan()
        assert to[1] == math.inf
        assert to[2] == -math.inf


def test_parts_that_threads_take_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(5 * TILE + 3)
    whole = {kind: made(base, kind, "") for kind in KINDS}
    monkeypatch.setattr(noise, "PART", 2 * TILE)
    monkeypatch.setattr(noise, "NATIVE_PART", 2 * TILE)
    for kind in KINDS:
        for suffix in ("", *native_suffixes()):
            assert same_bits(made(base, kind, suffix), whole[kind])


@pytest.mark.skipif(library() is None, reason="there is no compiler here")
def test_threads_of_our_own_do_it_where_torch_has_no_team(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(40 * TILE + 3)
    whole = made(base, GAUSSIAN, "")
    assert same_bits(made(base, GAUSSIAN, native_suffixes()[0]), whole)
    monkeypatch.setattr(team, "_parallel", lambda: None)
    assert same_bits(made(base, GAUSSIAN, native_suffixes()[0]), whole)


def test_strides_do_not_matter() -> None:
    base = torch.randn(40, 30)
    turned = base.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(made(base, GAUSSIAN, ""), made(turned, GAUSSIAN, ""))


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (torch.bfloat16, 1.0, 1 + 2**-7),
        (torch.float16, 1.0, 1 + 2**-10),
        (torch.float16, 2.0**-14 - 2**-24, 2.0**-14),
        (torch.float16, 2.0**-20, 2.0**-20 + 2**-24),
        (torch.float16, 0.0, 2.0**-24),
    ],
)
def test_random_rounding_is_right_on_average(dtype: torch.dtype, low: float, high: float) -> None:
    """A value a quarter of the way between two numbers goes up a quarter of the time, whatever its sign."""
    count = 1 << 16
    values = torch.full((count,), low + (high - low) / 4)
    found, turned = (noise._rounded(v, dtype, 4, 0) for v in (values, -values))
    share = (found.float() > low).float().mean()
    assert found.dtype == dtype
    assert set(found.float().unique().tolist()) == {low, high}
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / count)
    assert same_bits(turned, -found)


def test_random_rounding_leaves_numbers_of_float16_and_what_is_beyond_them() -> None:
    inside = torch.arange(-(2**15), 2**15).short().view(torch.float16)
    beyond = torch.tensor([65519.0, 65520.0, -65519.0, -65520.0, math.inf, -math.inf, math.nan])
    for values in (inside.float(), beyond):
        found, nearest = noise._rounded(values, torch.float16, 1, 0), values.half()
        assert torch.equal(found.isnan(), nearest.isnan())
        assert same_bits(found[~found.isnan()], nearest[~nearest.isnan()])


def test_small_steps_of_float16_are_not_lost() -> None:
    """A step of a hundredth of what lies between two numbers, however it is made."""
    base = torch.ones(TILE).half()
    change, key = torch.full((TILE,), 1e-5), 7
    found = [torch.empty_like(base) for _ in range(3)]
    add_directions(found[0], base, [Direction(1, 1e-5, RADEMACHER)], rounding_key=key)
    add_values(found[1], base, change, rounding_key=key)
    factors = [(torch.full((1, 8), 1e-5), torch.ones(1, TILE // 8))]
    add_low_rank(found[2].view(8, -1), base.view(8, -1), factors, rounding_key=key)
    for to in found:
        assert 0 < (to != base).float().mean() < 0.05


@pytest.mark.parametrize("suffix", ["", *native_suffixes()])
def test_a_scale_of_minus_zero_is_zero_whichever_came_first(suffix: str) -> None:
    base, found = torch.full((TILE,), -0.0), []
    for scales in ((0.0, -0.0), (-0.0, 0.0)):
        for k in range(65):  # other scales push these out of what is remembered
            add_directions(torch.zeros(1), torch.zeros(1), [Direction(0, 1.0 + k)], suffix="")
        for scale in scales:
            found.append(torch.empty_like(base))
            add_directions(found[-1], base, [Direction(1, scale)], suffix=suffix)
    assert all(same_bits(to, found[0]) for to in found)


def test_in_place_is_the_same() -> None:
    base = torch.randn(TILE + 9)
    expected = made(base, RADEMACHER, "")
    add_directions(base, base, directions(RADEMACHER))
    assert same_bits(base, expected)
