"""Every packed format decoded to float16: native code has the bits that torch rounds the definition's values to."""

import math

import pytest
import torch
from test_gguf import any_bytes, blocks_of
from test_unpack import STRETCH, SUFFIXES, native, packed

from ssdtune.kernels import decoding, lossless, store_mode, unpack_native
from ssdtune.kernels.affine import ORDERS, TILE, Affine
from ssdtune.kernels.formats import Format
from ssdtune.kernels.ggml import KINDS, Ggml
from ssdtune.kernels.nibbles import E2M1, NF4, Nibbles, Nvfp4
from ssdtune.kernels.rotated import Rotated
from ssdtune.kernels.unpack import unpack

pytestmark = pytest.mark.skipif(native is None, reason="there is no compiler here")
every_suffix = pytest.mark.parametrize("suffix", SUFFIXES)
FORMATS: tuple[Format, ...] = (
    *(Affine(bits, order) for bits, order in ORDERS.items()),
    Affine(4, (2, 1, 1, 2, 2), 32),
    Rotated(Affine(4, (4,), 128)),
    Nibbles(NF4, 64, True),
    Nibbles(NF4, 20, True, "F16"),
    Nibbles(NF4, 48, True, "BF16"),  # blocks that do not divide what is made at a time
    Nibbles(NF4, 2 * STRETCH, True),
    Nibbles(E2M1, 32, False, "E8M0"),
    Nibbles(E2M1, 16, False, "F8_E4M3"),
    Nvfp4(is_divided=False),
)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit; of what is no number that it is none."""
    is_number = ~expected.isnan()
    assert torch.equal(found.isnan(), ~is_number)
    kept = (found[is_number].view(torch.int16), expected[is_number].view(torch.int16))
    assert torch.equal(*kept)


def check(format: Format, parts: list[torch.Tensor], size: int, suffix: str) -> torch.Tensor:
    """Where it is aligned and where not; nothing beside the output is written."""
    expected = torch.empty(size, dtype=torch.float16)
    format.by_torch(parts, expected)
    for shift in (0, 1):
        room = torch.full((size + 128,), 7.0, dtype=torch.float16)
        found = room[64 + shift :][:size]
        unpack(format, parts, found, suffix=suffix)
        assert_same(found, expected)
        assert room[: 64 + shift].eq(7).all()
        assert room[64 + shift + size :].eq(7).all()
    return expected


@every_suffix
@pytest.mark.parametrize("asked", store_mode.WAYS)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.label)
def test_native_code_has_the_definitions_bits(
    format: Format, asked: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store_mode.VARIABLE, asked)
    monkeypatch.setattr(decoding, "STREAM_BYTES", 0)
    monkeypatch.setattr(unpack_native, "PART", 2 * STRETCH)
    for size in (1, TILE - 1, 5 * STRETCH + 77):
        check(format, packed(format, size), size, suffix)


@every_suffix
def test_numbers_that_float16_has_few_of_or_none(suffix: str) -> None:
    """Below the normal ones, ties, overflow, infinities, zeros of both signs."""
    exponents = torch.arange(-40, 24, dtype=torch.float32)
    factors = torch.tensor([1.0, -1.0, 1 + 2**-7, 1.5])
    scales = torch.cat([(factors.unsqueeze(1) * 2.0**exponents).view(-1), torch.tensor([math.inf])])
    size = len(scales) * 64
    for format in (Affine(8, (8,)), Nibbles(NF4, 64, True, "BF16")):
        parts = packed(format, size)
        parts[1] = scales.bfloat16()
        expected = check(format, parts, size, suffix)
        assert expected.isinf().any()
        assert (expected.abs() < 2**-14).logical_and(expected != 0).any()


@every_suffix
@pytest.mark.parametrize("bits", [3, 4])
def test_lossless_weights(bits: int, suffix: str) -> None:
    values = torch.randn(2 * lossless.CHUNK + 77).bfloat16()
    values[:4] = torch.tensor([math.nan, -math.inf, 1e-6, -0.0])
    format, parts = lossless.pack(values, bits)
    assert_same(check(format, parts, values.numel(), suffix), values.half())


@every_suffix
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.block > 1])
def test_blocks_of_ggml(kind: str, suffix: str) -> None:
    for make in (blocks_of, any_bytes):
        blocks = make(kind, 41).reshape(-1)
        check(Ggml(kind), [blocks], 41 * KINDS[kind].block, suffix)


def test_native_code_is_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked by threads that do nothing."""
    monkeypatch.setattr(decoding.Threads, "run", lambda self, function, job, num_parts: None)
    for format in (Affine(4, (4,)), Rotated(Affine(4, (4,))), Nibbles(NF4, 64, True)):
        untouched = torch.full((TILE,), 7.0).half()
        unpack(format, packed(format, TILE), untouched)
        assert untouched.eq(7).all()
