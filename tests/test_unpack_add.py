"""Decoding and moving in one pass: the bits of the two passes that define it, whoever does it."""

import ctypes
import math

import pytest
import torch
from test_unpack import SUFFIXES, native, packed

from ssdtune.kernels import decoding, store_mode
from ssdtune.kernels import unpack_add as module
from ssdtune.kernels.affine import GROUPS, ORDERS, Affine
from ssdtune.kernels.formats import Format
from ssdtune.kernels.nibbles import BNB_FP4, E2M1, NF4, NestedNibbles, Nibbles, Nvfp4, TurnedMxfp4
from ssdtune.kernels.noise import (
    KINDS,
    RADEMACHER,
    TILE,
    Direction,
    NativeNoise,
    add_directions,
)
from ssdtune.kernels.unpack_add import Move, unpack_add
from ssdtune.kernels.unpack_native import affine_job, nibbles_job

pytestmark = pytest.mark.skipif(native is None, reason="there is no compiler here")
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SIZES = (1, 1000, TILE, 3 * TILE + 77)
FORMATS: tuple[Format, ...] = (
    *(Affine(bits, order) for bits, order in ORDERS.items()),
    *(Affine(bits, (4, 1, 1, 2), 32) for bits in (4, 5, 6, 8)),
    Affine(3, (2, 1, 1, 2, 2), 128),
    Nibbles(NF4, 64, True),
    Nibbles(BNB_FP4, 64, True),
    Nibbles(E2M1, 32, False, "E8M0"),
    Nibbles(E2M1, 16, False, "F8_E4M3"),
    Nibbles(NF4, 48, True),  # blocks that do not divide pieces take two passes
)
# What signs are added to while it is decoded.
SIGNED: tuple[Affine | Nibbles, ...] = (
    *(Affine(bits, order, group) for bits, order in ORDERS.items() for group in GROUPS),
    *(
        Nibbles(NF4, block, block == 64, scale)
        for block in (32, 64, 128)
        for scale in ("F32", "BF16", "F16")
    ),
)
UPDATE = Move((Direction(6, -2e-3), Direction(9, 1e-3, RADEMACHER)), 0.99, 2**63 + 77)


def shift(kind: str) -> Move:
    return Move((Direction(2**63 + 5, 1e-3, kind),))


def parts_of(format: Format, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Any codes, scales that are numbers."""
    wanted_parts = format.parts(shape)
    if isinstance(format, TurnedMxfp4):
        generator = torch.Generator().manual_seed(0)
        made = [torch.randint(0, 256, p.shape, dtype=torch.uint8, generator=generator) for p in wanted_parts]  # fmt: skip
    else:
        made = packed(format, torch.Size(shape).numel())
    for part, wanted in zip(made, wanted_parts, strict=True):
        if wanted.dtype == "F8_E4M3":
            part.view(torch.uint8).bitwise_and_(0x3F)
        elif isinstance(format, Nibbles | TurnedMxfp4) and wanted.suffix == "scales":
            if wanted.dtype == "U8":  # e8m0: 2^-27 to 2^36
                part.div_(4, rounding_mode="floor").add_(100)
    return [p.view(w.shape) for p, w in zip(made, wanted_parts, strict=True)]


def by_hand(
    format: Format, parts: list[torch.Tensor], out: torch.Tensor, moves: list[Move]
) -> torch.Tensor:
    """The definition: every pass by torch."""
    format.by_torch(parts, out)
    for move in moves:
        more = {"decay": move.decay, "rounding_key": move.rounding_key}
        add_directions(out, out, move.directions, suffix="", **more)  # type: ignore[arg-type]
    return out


def assert_same(
    format: Format,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    moves: list[Move],
    suffix: str | None,
) -> None:
    parts = parts_of(format, shape)
    expected = by_hand(format, parts, torch.empty(shape, dtype=dtype), moves)
    around = torch.full((expected.numel() + 128,), 7.0, dtype=dtype)
    found = around[64:-64].view(shape)
    unpack_add(format, parts, found, moves, suffix=suffix)
    assert not expected.isnan().any()
    assert torch.equal(found.view(BITS[dtype]), expected.view(BITS[dtype])), (format, shape, moves)
    assert around[:64].eq(7).all()
    assert around[-64:].eq(7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.label)
def test_one_pass_has_the_bits_of_two(format: Format, suffix: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        for kind in KINDS:
            assert_same(format, (size,), dtype, [shift(kind)], suffix)
        assert_same(format, (size,), dtype, [UPDATE, Move((), 0.5, 3), shift(RADEMACHER)], suffix)


@pytest.mark.parametrize("suffix", ["", *SUFFIXES, None])
@pytest.mark.parametrize(
    ("format", "shape"),
    [
        (NestedNibbles(NF4, 64, 256, 0.01), (TILE, 5)),
        (NestedNibbles(NF4, 64, 256, 0.01), (77,)),
        (Nvfp4(is_divided=True), (33, 512)),
        (Nvfp4(is_divided=False), (3, 16)),
        (Nvfp4(is_divided=False, num_stored=16), (TILE, 5)),
        (Nvfp4(is_divided=False, num_stored=16), (77,)),
        (TurnedMxfp4(), (2, 64, 33)),
    ],
)
def test_scales_that_are_computed_first(
    format: Format, shape: tuple[int, ...], suffix: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slabs begin where fields of noise do."""
    monkeypatch.setattr("ssdtune.kernels.nibbles.SLAB", TILE)
    for dtype in (torch.float32, torch.bfloat16):
        for moves in ([UPDATE, shift("gaussian")], [shift(RADEMACHER)]):
            assert_same(format, shape, dtype, moves, suffix)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("step", [-0.03, 1.7e-38, 2**-10], ids=["usual", "tiny", "a bfloat16"])
@pytest.mark.parametrize(
    "format", SIGNED, ids=lambda format: f"{format.label} {format.parts((1,))[1].dtype}"
)
def test_signs_are_added_while_codes_are_decoded(
    format: Affine | Nibbles, step: float, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no product of a piece is infinite, and where some are; stored past the caches or through them. Sums may be
    below the least normal number, or 0 where the step is a bfloat16 number."""
    monkeypatch.setattr(decoding, "STREAM_BYTES", 0)
    size = 2 * TILE + 777
    block = format.group if isinstance(format, Affine) else format.block
    move = Move((Direction(2**63 + 5, step, RADEMACHER),))
    parts = parts_of(format, (size,))
    scales = parts[-2] if isinstance(format, Affine) else parts[-1]
    most = torch.finfo(scales.dtype).max
    scales[1] = min(most, 2.0**98)
    scales[2:5] = 1.3e-38
    scales[5:20] = 2**-10
    scales[2 * TILE // block + 1] = most  # some of its products are infinite
    for scale in (1.0, math.inf):
        scales[TILE // block + 3] = scale
        expected = by_hand(format, parts, torch.empty(size, dtype=torch.bfloat16), [move])
        for asked in store_mode.WAYS:
            monkeypatch.setenv(store_mode.VARIABLE, asked)
            around = torch.full((size + 128,), 7.0).bfloat16()
            found = around[64:-64]
            unpack_add(format, parts, found, [move], suffix=suffix)
            is_none = expected.isnan()  # of any bits
            assert torch.equal(found.isnan(), is_none), asked
            same = found.view(torch.int16) == expected.view(torch.int16)
            assert torch.all(same | is_none), asked
            assert around[:64].eq(7).all()
            assert around[-64:].eq(7).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("format", "move", "is_done"),
    [
        *((format, shift(RADEMACHER), True) for format in SIGNED),
        (SIGNED[0], shift("gaussian"), False),
        (SIGNED[0], UPDATE, False),
        (SIGNED[0], Move(shift(RADEMACHER).directions, 0.5), False),
        (SIGNED[0], Move(shift(RADEMACHER).directions, 1.0, 77), False),
        (SIGNED[0], Move((Direction(5, 0.0, RADEMACHER),)), False),
        (Nibbles(NF4, 256, True), shift(RADEMACHER), False),
    ],
)
def test_what_is_moved_while_it_is_decoded(
    format: Affine | Nibbles, move: Move, is_done: bool, suffix: str
) -> None:
    """Signs alone, by processors with vectors; the native function says whether it did it."""
    assert native is not None
    out, parts = torch.empty(TILE, dtype=torch.bfloat16), parts_of(format, (TILE,))
    if isinstance(format, Affine):
        job, name = affine_job(format, parts, out), "ssdtune_affine_signs"
    else:
        job, name = nibbles_job(format, parts, out), "ssdtune_nibbles_signs"
    noise = NativeNoise(
        move.directions, out.dtype, decay=move.decay, rounding_key=move.rounding_key
    )
    arguments = [
        ctypes.c_void_p(at) for at in (ctypes.addressof(job), noise.address, out.data_ptr())
    ]
    done = native.function(name, suffix)(*arguments, *map(ctypes.c_int64, (0, TILE, 0)))
    assert done == (is_done and suffix in ("_avx512", "_avx2"))


def test_dtypes_that_native_code_does_not_know() -> None:
    assert_same(Affine(4, (4,)), (700,), torch.float16, [shift("gaussian")], None)


def test_nothing_is_nothing_and_no_moves_are_decoding() -> None:
    unpack_add(Affine(4, (4,)), parts_of(Affine(4, (4,)), (0,)), torch.empty(0), [UPDATE])
    assert_same(Affine(4, (4,)), (700,), torch.bfloat16, [], None)


def test_parts_that_threads_take_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NATIVE_PART", TILE)
    for format in (FORMATS[3], FORMATS[-3]):
        assert_same(format, (40 * TILE + 3,), torch.bfloat16, [UPDATE], None)


def test_native_code_is_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked by a team that does nothing: one pass leaves the output alone."""
    monkeypatch.setattr(module, "run_by_all", lambda function, job, num_parts: None)
    for format in (*FORMATS[:-1], NestedNibbles(NF4, 64, 256, 0.01), Nvfp4(True)):
        untouched = torch.full((16, 64), 7.0)
        unpack_add(format, parts_of(format, (16, 64)), untouched, [UPDATE])
        assert untouched.eq(7).all(), format
