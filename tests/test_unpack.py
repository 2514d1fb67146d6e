"""Native code that decodes packed tensors: values worked out by hand, and the bits of the formats' definitions."""

import math
import struct
from collections.abc import Iterator, Sequence

import pytest
import torch

from ssdtune.kernels import decoding, store_mode, unpack_native
from ssdtune.kernels.affine import GROUPS, ORDERS, SLICE_WIDTHS, TILE, Affine, widths
from ssdtune.kernels.formats import Format
from ssdtune.kernels.native import library
from ssdtune.kernels.nibbles import E2M1, NF4, SCALE_DTYPES, Nibbles, Nvfp4
from ssdtune.kernels.unpack import unpack

native = library()
SUFFIXES: tuple[str, ...] = () if native is None else native.suffixes
DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16}  # and of their bits
STRETCH = 8 * TILE  # elements that unpack.c prepares at a time
SIZES = (1, 31, 33, 65, TILE - 1, TILE, TILE + 1, STRETCH - 1, STRETCH, 3 * STRETCH + 77)
SMALL = (0.0, -0.0, 2**-133, -(2**-126), 2**-111, 2**-110)  # scales
BLOCKS = (1, 2, 7, 16, 32, 48, 64, 96, 100, 128, 4096)  # odd, and no powers of two, too
LOPSIDED = tuple(0.1 * i * i - 3 for i in range(16))
GUARD = 64  # elements on either side of an output, which nobody may touch

needs_native = pytest.mark.skipif(not SUFFIXES, reason="there is no compiler here")
every_suffix = pytest.mark.parametrize("suffix", SUFFIXES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))
pytestmark = needs_native


def orders(num_bits: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut so many bits into slices."""
    if num_bits == 0:
        yield ()
    for width in SLICE_WIDTHS:
        if width <= num_bits:
            for rest in orders(num_bits - width):
                yield (width, *rest)


def packed(
    format: Format, num_elements: int, *, seed: int = 0, any_scale: bool = False
) -> list[torch.Tensor]:
    """Random parts. any_scale: any bits at all, infinities and NaNs too; else as weights have them."""
    generator = torch.Generator().manual_seed(seed)
    made: list[torch.Tensor] = []
    for part in format.parts((num_elements,)):
        if part.dtype in ("U8", "F8_E4M3"):
            found = torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator)
            made.append(found if part.dtype == "U8" else found.view(torch.float8_e4m3fn))
        elif any_scale:
            kind = SCALE_DTYPES[part.dtype]
            limit = 1 << 8 * kind.itemsize - 1
            bits = torch.randint(-limit, limit, part.shape, generator=generator)
            made.append(bits.to({2: torch.int16, 4: torch.int32}[kind.itemsize]).view(kind))
        else:
            values = (torch.rand(part.shape, generator=generator) - 0.3) * 0.02
            made.append(values.to(SCALE_DTYPES[part.dtype]))
    return made


def decoded(
    format: Format,
    parts: Sequence[torch.Tensor],
    num_elements: int,
    dtype: torch.dtype,
    suffix: str,
    *,
    shift: int = 0,
) -> torch.Tensor:
    """What comes out, as bits; what lies around it must not change. shift: elements from an aligned address."""
    around = torch.full((num_elements + 2 * GUARD,), 7.0, dtype=dtype)
    out = around[GUARD + shift :][:num_elements]
    unpack(format, parts, out, suffix=suffix)
    assert around[: GUARD + shift].eq(7).all()
    assert around[GUARD + shift + num_elements :].eq(7).all()
    return out.clone().view(DTYPES[dtype])


def differing(
    format: Format,
    num_elements: int,
    dtype: torch.dtype,
    suffix: str,
    *,
    any_scale: bool = False,
    shift: int = 0,
) -> int:
    """Elements whose bits are others than by the definition."""
    parts = packed(format, num_elements, seed=num_elements, any_scale=any_scale)
    expected = decoded(format, parts, num_elements, dtype, "")
    found = decoded(format, parts, num_elements, dtype, suffix, shift=shift)
    return int(found.ne(expected).sum())


# ------------------------------------------------------------------ worked out by hand


def one_tile(width: int, first: int) -> torch.Tensor:
    """A slice of one tile, zeros but for its first byte."""
    made = torch.zeros(64 * width, dtype=torch.uint8)
    made[0] = first
    return made


NESTED = [one_tile(4, 0x5A), one_tile(1, 0b01), one_tile(1, 0b10), one_tile(2, 0b11)]
# format; slices; scale and zero; values of elements by number: of byte 0's fields, which are 64 elements apart.
AFFINE_BY_HAND = [
    # z = (127 + 1/2) / 16 - 1/2 = 7.46875; (10 - z) / 2 and (5 - z) / 2
    (Affine(4, (4,)), NESTED[:1], 0.5, 127, {0: 1.265625, 64: -1.234375}),
    # z = (128 + 1/2) / 8 - 1/2 = 15.5625; (0b10101 - z) / 2 and (0b01010 - z) / 2
    (Affine(5, (4, 1, 1, 2)), NESTED[:2], 0.5, 128, {0: 2.71875, 64: -2.78125}),
    # z = u = 128; (0b10101011 - z) / 4 and (0b01010100 - z) / 4
    (Affine(8, (4, 1, 1, 2)), NESTED, 0.25, 128, {0: 10.75, 64: -11.0}),
    # z = (64 + 1/2) / 128 - 1/2 = 0.00390625; (1 - z) 2 and (0 - z) 2. The former is 1.9921875: exact in bfloat16
    (Affine(1, (1,)), [one_tile(1, 0b1)], 2.0, 64, {0: 1.9921875, 64: -0.0078125}),
    # z = 3; (200 - 3) (1 + 2^-7) = 198.5390625: bfloat16 has steps of 1 there
    (Affine(8, (8,)), [one_tile(8, 200)], 1.0078125, 3, {0: 198.5390625}),
]
NIBBLES_BY_HAND = [
    (Nibbles(NF4, 64, True), [0xF0], 2.0, [2.0, -2.0]),
    (Nibbles(NF4, 64, False), [0xF0], 2.0, [-2.0, 2.0]),
    (Nibbles(E2M1, 16, False, "BF16"), [0x2F, 0x07], 0.5, [-3.0, 0.5, 3.0, 0.0]),
    (Nibbles(E2M1, 32, False, "F16"), [0x1D], 2**-24, [-3 * 2**-24, 2**-25]),
    (Nibbles(E2M1, 32, False, "E8M0"), [0x2F], 128, [-12.0, 2.0]),
    (Nibbles(E2M1, 32, False, "E8M0"), [0x2F], 0, [-6 * 2**-127, 2**-127]),
    (Nibbles(E2M1, 16, True, "F8_E4M3"), [0x6F], 0b0_1000_100, [12.0, -18.0]),  # 1.5 x 2
    (Nibbles(E2M1, 16, False, "UE5M3"), [0x6F], 0b10000_100, [-18.0, 12.0]),  # 1.5 x 2
    (Nibbles(E2M1, 16, False, "UE5M3"), [0x2F], 0b00000_011, [-18 * 2**-17, 3 * 2**-17]),
    (Nibbles(E2M1, 16, False, "UE5M3"), [0x2F], 0b00001_000, [-6 * 2**-14, 2**-14]),
    (Nibbles(E2M1, 16, False, "UE5M3"), [0x2F], 0b11111_110, [-6.0 * 114_688, 114_688.0]),
]


def in_bfloat16(value: float) -> float:
    """The nearest bfloat16, of two equally near ones the one whose last bit is 0."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    lower = bits >> 16
    up = bits & 0xFFFF > 0x8000 or (bits & 0xFFFF == 0x8000 and lower & 1)
    return struct.unpack("<f", struct.pack("<I", lower + up << 16))[0]


@every_dtype
@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
@pytest.mark.parametrize(("format", "slices", "scale", "zero", "values"), AFFINE_BY_HAND)
def test_affine_codes_stand_for_what_the_formula_says(
    format: Affine,
    slices: list[torch.Tensor],
    scale: float,
    zero: int,
    values: dict[int, float],
    suffix: str,
    dtype: torch.dtype,
) -> None:
    num_groups = TILE // format.group
    parts = [
        *slices,
        torch.full((num_groups,), scale, dtype=torch.bfloat16),
        torch.full((num_groups,), zero, dtype=torch.uint8),
    ]
    found = decoded(format, parts, TILE, dtype, suffix).view(dtype)
    for element, value in values.items():
        assert found[element] == (value if dtype == torch.float32 else in_bfloat16(value))


@every_dtype
@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
@pytest.mark.parametrize(("format", "codes", "scale", "values"), NIBBLES_BY_HAND)
def test_nibbles_stand_for_their_table_times_the_scale(
    format: Nibbles,
    codes: list[int],
    scale: float,
    values: list[float],
    suffix: str,
    dtype: torch.dtype,
) -> None:
    kind = SCALE_DTYPES[format.scale]
    if kind.itemsize == 1:
        scales = torch.tensor([int(scale)], dtype=torch.uint8).view(kind)
    else:
        scales = torch.tensor([scale], dtype=kind)
    parts = [torch.tensor(codes, dtype=torch.uint8), scales]
    found = decoded(format, parts, len(values), dtype, suffix).view(dtype)
    assert found.tolist() == values


# ------------------------------------------------------------------ the definition's bits


@every_dtype
@every_suffix
@pytest.mark.parametrize("num_bits", range(1, 9))
def test_every_order_of_slices_is_read(num_bits: int, suffix: str, dtype: torch.dtype) -> None:
    for order in orders(num_bits):
        assert not differing(Affine(num_bits, order), TILE + 3, dtype, suffix), order


@every_suffix
def test_a_file_is_read_at_each_of_its_widths(suffix: str) -> None:
    for order in ((4, 1, 1, 2), (2, 1, 1, 2, 2), (1,) * 8):
        for bits in widths(order):
            assert not differing(Affine(bits, order), 700, torch.bfloat16, suffix), (order, bits)


@every_dtype
@every_suffix
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", ORDERS)
def test_affine_tensors_of_any_size_have_the_definitions_bits(
    bits: int, group: int, suffix: str, dtype: torch.dtype
) -> None:
    format = Affine(bits, ORDERS[bits], group)
    for size in SIZES:
        assert not differing(format, size, dtype, suffix), size
        assert not differing(format, size, dtype, suffix, any_scale=True), size


@every_dtype
@every_suffix
@pytest.mark.parametrize("bits", ORDERS)
def test_all_codes_with_all_zeros(bits: int, suffix: str, dtype: torch.dtype) -> None:
    """Each zero with each code, under scales of every fraction and either sign: with ties, and zeros below zero."""
    format = Affine(bits, ORDERS[bits], 32)
    num_elements = 256 * 256
    parts = packed(format, num_elements)
    for s, width in enumerate(format.slices):
        parts[s] = torch.arange(64 * width * num_elements // TILE).to(torch.uint8)
    number = torch.arange(num_elements // 32)
    parts[-1] = (number % 256).to(torch.uint8)
    fractions = 0x3C00 + (number * 37 // 8) % 128
    for every in (3, num_elements):  # scales that are negative; with none, 8 bits take another way
        bits_of = torch.where(number % every == 0, fractions - 0x8000, fractions)
        parts[-2] = bits_of.short().view(torch.bfloat16)
        expected = decoded(format, parts, num_elements, dtype, "")
        assert torch.equal(decoded(format, parts, num_elements, dtype, suffix), expected), every


@every_dtype
@every_suffix
@pytest.mark.parametrize("scale", [*SMALL, 2.0**98, 2.0**99, 3.3e38, math.inf, math.nan])
def test_scales_at_the_ends_of_the_range(scale: float, suffix: str, dtype: torch.dtype) -> None:
    for bits, order in ORDERS.items():
        format = Affine(bits, order)
        parts = packed(format, 1000)
        parts[-2].abs_()
        parts[-2][3] = scale
        expected = decoded(format, parts, 1000, dtype, "")
        assert torch.equal(decoded(format, parts, 1000, dtype, suffix), expected), bits


@every_dtype
@every_suffix
@pytest.mark.parametrize("is_high_first", [False, True], ids=["low first", "high first"])
@pytest.mark.parametrize("scale", SCALE_DTYPES)
@pytest.mark.parametrize("table", [NF4, E2M1, LOPSIDED], ids=["NF4", "E2M1", "lopsided"])
def test_nibbles_of_any_size_have_the_definitions_bits(
    table: tuple[float, ...], scale: str, is_high_first: bool, suffix: str, dtype: torch.dtype
) -> None:
    for block in BLOCKS:
        format = Nibbles(table, block, is_high_first, scale)
        for size in (1, block - 1, block + 17, 2 * block, 2 * block + 1, 5000):
            if size:
                assert not differing(format, size, dtype, suffix), (block, size)


@every_dtype
@every_suffix
def test_a_scale_of_the_whole_tensor_has_the_definitions_bits(
    suffix: str, dtype: torch.dtype
) -> None:
    """It is worked into the table of what comes out for each scale of a byte."""
    for format in (Nvfp4(is_divided=False, num_stored=16), Nvfp4(is_divided=True)):
        for size in SIZES:
            assert not differing(format, size, dtype, suffix)


@every_dtype
@every_suffix
@pytest.mark.parametrize("scale", ["F32", "BF16"])
@pytest.mark.parametrize("block", [7, 16, 32, 64])
def test_nibbles_take_any_scale(block: int, scale: str, suffix: str, dtype: torch.dtype) -> None:
    format = Nibbles(LOPSIDED, block, False, scale)
    for size in (block, 65 * block, 5000):
        assert not differing(format, size, dtype, suffix, any_scale=True), size
    for value in (math.nan, math.inf, -math.inf, -0.0, 1e-39, 3.3e38):
        for size in (block, 2 * block, 3 * block - 1):
            codes, scales = packed(format, size)
            scales[-1] = value
            expected = decoded(format, (codes, scales), size, dtype, "")
            found = decoded(format, (codes, scales), size, dtype, suffix)
            assert torch.equal(found, expected), (value, size)


@every_suffix
def test_every_float16_scale(suffix: str) -> None:
    """All of them, but for the bits of what is no number in float32."""
    format = Nibbles(E2M1, 16, False, "F16")
    num_elements = 16 << 16
    parts = packed(format, num_elements)
    parts[1] = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16)
    for dtype in DTYPES:
        expected = decoded(format, parts, num_elements, dtype, "").view(dtype)
        found = decoded(format, parts, num_elements, dtype, suffix).view(dtype)
        is_none = expected.isnan()
        assert torch.equal(found.isnan(), is_none)
        kind = DTYPES[dtype]
        assert torch.equal(found[~is_none].view(kind), expected[~is_none].view(kind))


@every_dtype
@every_suffix
def test_a_table_with_infinities(suffix: str, dtype: torch.dtype) -> None:
    format = Nibbles((*NF4[:-1], math.inf), 64, True)
    parts = packed(format, 500)
    parts[1][2] = 0.0
    expected = decoded(format, parts, 500, dtype, "")
    assert torch.equal(decoded(format, parts, 500, dtype, suffix), expected)


# ------------------------------------------------------------------ where it lies, who does it

MIXED = (
    *(Affine(bits, order, 64) for bits, order in ORDERS.items()),
    Affine(4, (4,), 32),
    Affine(8, (8,), 128),
    Nibbles(NF4, 64, True),
    Nibbles(E2M1, 32, False, "E8M0"),
    Nibbles(E2M1, 16, False, "F8_E4M3"),
    Nibbles(NF4, 48, True, "BF16"),
    Nibbles(NF4, 20, True),
)


@every_dtype
@every_suffix
@pytest.mark.parametrize("shift", [0, 1, 8, 13])
def test_stores_past_the_caches(
    shift: int, suffix: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Aligned ones; an output that is not aligned is stored as others are."""
    monkeypatch.setenv(store_mode.VARIABLE, "streamed")
    monkeypatch.setattr(decoding, "STREAM_BYTES", 0)
    for format in MIXED:
        for size in (TILE, 3 * STRETCH + 77):
            assert not differing(format, size, dtype, suffix, shift=shift), (format, size)


@every_suffix
def test_parts_may_lie_anywhere(suffix: str) -> None:
    def moved(part: torch.Tensor) -> torch.Tensor:
        content = bytearray(1) + bytearray(part.view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(content, dtype=part.dtype, offset=1)

    for format in MIXED:
        parts = packed(format, 3 * TILE + 5)
        expected = decoded(format, parts, 3 * TILE + 5, torch.bfloat16, "")
        elsewhere = [moved(part) for part in parts]
        assert all(part.data_ptr() % 2 for part in elsewhere)
        found = decoded(format, elsewhere, 3 * TILE + 5, torch.bfloat16, suffix)
        assert torch.equal(found, expected), format


@every_suffix
@pytest.mark.parametrize("num_threads", [1, 3])
def test_parts_that_threads_take_make_the_whole(
    num_threads: int, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_threads", decoding.Threads(num_threads))
    monkeypatch.setattr(unpack_native, "PART", STRETCH)
    for format in MIXED:
        assert not differing(format, 9 * STRETCH + 77, torch.bfloat16, suffix), format


@pytest.mark.parametrize(
    ("n", "num_threads", "part"),
    [(1, 1, 100), (799, 1, 100), (1600, 1, 200), (1600, 2, 100), (10**9, 2, 900)],
)
def test_threads_take_many_parts_of_what_is_large(
    n: int, num_threads: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "LARGEST_PART", 999)
    assert decoding.larger(100, n, num_threads) == part


def test_a_thread_takes_parts_until_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_threads", decoding.Threads(1))
    monkeypatch.setattr(unpack_native, "PART", STRETCH)
    assert not differing(Affine(8, (8,)), 25 * STRETCH + 77, torch.bfloat16, SUFFIXES[0])


def test_threads_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_threads", decoding.Threads(1))
    decoding.set_threads(2)
    assert decoding._threads.num_threads == 2
    assert not differing(Affine(4, (4,)), 2 * unpack_native.PART, torch.bfloat16, SUFFIXES[0])


@every_suffix
def test_shapes_do_not_matter_and_nothing_is_nothing(suffix: str) -> None:
    format = Affine(4, (4,))
    parts = packed(format, 30 * 40)
    flat, matrix = torch.empty(30 * 40), torch.empty(30, 40)
    unpack(format, parts, flat, suffix=suffix)
    unpack(format, parts, matrix, suffix=suffix)
    assert torch.equal(flat.view(30, 40), matrix)
    unpack(format, packed(format, 0), torch.empty(0, 5), suffix=suffix)


@every_suffix
def test_parts_that_are_too_short_are_not_read(suffix: str) -> None:
    for format in MIXED:
        for short in range(len(packed(format, TILE))):
            parts = packed(format, TILE)
            parts[short] = parts[short][:-1]
            with pytest.raises(AssertionError):
                unpack(format, parts, torch.empty(TILE), suffix=suffix)


def test_native_code_is_what_is_used() -> None:
    """Where nothing is said, and for the dtypes that it knows: checked by a library that does nothing."""
    format = Affine(4, (4,))
    parts = packed(format, TILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpack_native, "run", lambda name, suffix, job, kernel: None)
        untouched, double = torch.full((TILE,), 7.0), torch.full((TILE,), 7.0, dtype=torch.float64)
        unpack(format, parts, untouched)
        unpack(format, parts, double)
    assert untouched.eq(7).all()
    assert not double.eq(7).all()
