"""Codes that are written come back, of every width and format, whatever the number of elements."""

import dataclasses

import pytest
import torch

from ssdtune.kernels import lossless
from ssdtune.kernels.affine import (
    GROUPS,
    LANES,
    ORDERS,
    SLICE_WIDTHS,
    TILE,
    Affine,
    join_slices,
    pack_slice,
    split_codes,
    unpack_slice,
    widths,
)
from ssdtune.kernels.formats import Format
from ssdtune.kernels.nibbles import BNB_FP4, E2M1, NF4, SCALE_DTYPES, Nibbles, Nvfp4
from ssdtune.kernels.quantize_affine import quantize_affine
from ssdtune.kernels.quantize_nibbles import quantize_nibbles, quantize_nvfp4
from ssdtune.kernels.rotated import Rotated
from ssdtune.kernels.unpack import unpack

# Nothing, one element, around a byte, a group, a tile, and behind one.
SHAPES = [(0,), (5, 0), (1,), (3, 3), (33,), (5, 13), (511,), (2, 256), (3, 7, 41)]
ONE = {"F32": 1.0, "BF16": 1.0, "F16": 1.0, "F8_E4M3": 1.0, "E8M0": 127, "UE5M3": 15 << 3}  # scales


def orders(bits: int) -> set[tuple[int, ...]]:
    """The usual one, the same backwards, and a slice for each bit."""
    return {ORDERS[bits], ORDERS[bits][::-1], (1,) * bits}


def codes_below(top: int, num: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (num,), dtype=torch.uint8, generator=generator)


def decoded(format: Format, parts: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """float32, by the definition; by what is fastest here it is the same."""
    assert [tuple(part.shape) for part in parts] == [part.shape for part in format.parts(shape)]
    found, fast = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    format.by_torch(parts, found)
    unpack(format, parts, fast)
    assert fast.view(torch.int32).equal(found.view(torch.int32))
    return found


# ------------------------------------------------------------------ slices


@pytest.mark.parametrize("width", SLICE_WIDTHS)
def test_a_slice_gives_back_its_codes(width: int) -> None:
    for shape in SHAPES:
        num = torch.Size(shape).numel()
        codes = codes_below(2**width, num, seed=num)
        packed = pack_slice(codes, width)
        assert packed.numel() == -(-num // TILE) * LANES * width
        found = unpack_slice(packed, width)
        assert found[:num].equal(codes)
        assert not found[num:].any(), "the last tile is filled up with zeros"
        for element in {0, 1, 63, 64, num // 2, num - 1} & set(range(num)):
            assert field(packed, width, element) == codes[element]


def field(packed: torch.Tensor, width: int, element: int) -> int:
    """The code of one element as docs/format.md has it: byte i of vector v holds, in its bits from j width on, element
    64 (v 8/width + j) + i of the tile."""
    tile, within = divmod(element, TILE)
    run, i = divmod(within, LANES)
    v, j = divmod(run, 8 // width)
    return int(packed[(tile * width + v) * LANES + i]) >> j * width & (1 << width) - 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_slices_give_back_codes_and_their_prefixes(bits: int) -> None:
    for order in orders(bits):
        for shape in SHAPES:
            num = torch.Size(shape).numel()
            codes = codes_below(2**bits, num, seed=num)
            slices = split_codes(codes, order)
            for count, width in enumerate(widths(order), 1):
                found = join_slices(slices[:count], order[:count])[:num]
                assert found.equal(codes >> bits - width), (order, width)


# ------------------------------------------------------------------ formats


@pytest.mark.parametrize("is_rotated", [False, True], ids=["affine", "rotated"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_affine_codes_come_back_from_what_they_stand_for(bits: int, is_rotated: bool) -> None:
    """With scales of 1, q = w + z; rotating takes two rotations to what it was, but for rounding."""
    group = GROUPS[bits % len(GROUPS)]
    for order in orders(bits):
        stored = Affine(bits, order, group)
        format = Rotated(stored) if is_rotated else stored
        for shape in SHAPES:
            *_, scales, zeros = (part.shape for part in format.parts(shape))
            codes, u = codes_below(2**bits, torch.Size(shape).numel()), codes_below(256, *zeros)
            parts = [*split_codes(codes, order), torch.ones(scales, dtype=torch.bfloat16), u]
            z = (u.float() + 0.5) * 2.0 ** (bits - 8) - 0.5
            found = decoded(format, parts, shape).view(-1)
            if is_rotated:
                found = turned_back(found, group)
            found += z.repeat_interleave(group)[: len(found)]
            if is_rotated:
                found.round_()
            assert found.equal(codes.float()), (order, shape)


def turned_back(values: torch.Tensor, group: int) -> torch.Tensor:
    """Whole groups times the Hadamard matrix, made of Kronecker products, by sqrt(group)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < group:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    whole = values.numel() // group * group
    rows = values[:whole].view(-1, group) @ matrix / group**0.5
    return torch.cat([rows.view(-1), values[whole:]])


TABLES = [
    *(Nibbles(NF4, 64, high, kind) for high in (False, True) for kind in ("BF16", "F32")),
    Nibbles(BNB_FP4, 48, True),
    Nibbles(NF4, 7, False, "F16"),
    Nibbles(E2M1, 32, False, "E8M0"),
    Nibbles(E2M1, 16, False, "F8_E4M3"),
    Nibbles(E2M1, 16, False, "UE5M3"),
]


@pytest.mark.parametrize("format", TABLES, ids=lambda f: f"{f.label}, {f.scale}")
def test_codes_of_a_table_come_back(format: Nibbles) -> None:
    for shape in SHAPES:
        codes = codes_below(16, torch.Size(shape).numel())
        scales = torch.full(format.parts(shape)[1].shape, ONE[format.scale])
        parts = [in_bytes(codes, format.is_high_first), scales.to(SCALE_DTYPES[format.scale])]
        found = decoded(format, parts, shape).view(-1)
        assert found.equal(torch.tensor(format.table)[codes.long()])


@pytest.mark.parametrize("format", [Nvfp4(False), Nvfp4(False, 16), Nvfp4(True)], ids=repr)
def test_codes_of_nvfp4_come_back(format: Nvfp4) -> None:
    whole = torch.zeros(format.num_stored)
    whole[0] = 0.25
    for shape in SHAPES:
        codes = codes_below(16, torch.Size(shape).numel())
        scales = torch.full(format.parts(shape)[1].shape, 2.0).to(torch.float8_e4m3fn)
        found = decoded(format, [in_bytes(codes, False), scales, whole], shape).view(-1)
        assert found.equal(torch.tensor(E2M1)[codes.long()] * (8 if format.is_divided else 0.5))


def in_bytes(codes: torch.Tensor, is_high_first: bool) -> torch.Tensor:
    """Two codes in a byte."""
    first, second = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2).unbind(1)
    return first << 4 | second if is_high_first else second << 4 | first


@pytest.mark.parametrize("bits", [3, 4])
def test_any_bits_of_bfloat16_come_back(bits: int) -> None:
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(len(shape))
        any_bits = torch.randint(-(2**15), 2**15, shape, generator=generator)
        values = any_bits.to(torch.int16).view(torch.bfloat16)
        format, parts = lossless.pack(values, bits)
        for suffix in ("", None):
            found = torch.zeros(shape, dtype=torch.bfloat16)
            unpack(format, parts, found, suffix=suffix)
            assert found.view(torch.int16).equal(values.view(torch.int16))


# ------------------------------------------------------------------ encoders


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 7, 11)], ids=str)
def test_encoders_make_the_parts_of_any_shape(shape: tuple[int, ...]) -> None:
    """And decoded they are near: the last group, which is not whole, no less than others."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for order in ((4,), (2, 1)):
        made = quantize_affine(values, order, 32)
        assert_near(values, Affine(sum(order), order, 32), made, 0.1)
    rotated = quantize_affine(values, (4,), 32, is_rotated=True)
    assert_near(values, Rotated(Affine(4, (4,), 32)), rotated, 0.1)
    for format in TABLES[-3:]:
        made = quantize_nibbles(
            values, format.table, format.block, format.scale, is_high_first=format.is_high_first
        )
        assert_near(values, format, made, 0.05)
    assert_near(values, Nvfp4(False, 16), quantize_nvfp4(values, 16), 0.05)


def assert_near(
    values: torch.Tensor, format: Format, made: dict[str, torch.Tensor], error: float
) -> None:
    """error: relative squared, of all values."""
    shape = tuple(values.shape)
    found = decoded(format, [made[part.suffix] for part in format.parts(shape)], shape)
    assert (found - values).square().sum() <= error * values.square().sum()


def test_a_narrower_reading_of_an_odd_shape_is_made_of_the_same_slices() -> None:
    values = torch.randn(3, 7, 41, generator=torch.Generator().manual_seed(1))
    whole = Affine(8, (4, 1, 1, 2), 64)
    made = quantize_affine(values, whole.order)
    errors: list[float] = []
    for bits in whole.readings:
        format = dataclasses.replace(whole, bits=bits)
        found = decoded(format, [made[p.suffix] for p in format.parts((3, 7, 41))], (3, 7, 41))
        errors.append(float((found - values).square().sum()))
    assert errors == sorted(errors, reverse=True)
