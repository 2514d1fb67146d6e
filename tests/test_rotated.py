"""Rotated groups: the matrix that their sums make, native code's bits, what rotation does to an outlier."""

import math

import pytest
import torch
from test_unpack import DTYPES, STRETCH, SUFFIXES, differing, packed

from ssdtune.kernels import decoding
from ssdtune.kernels.affine import GROUPS, ORDERS, TILE, Affine
from ssdtune.kernels.formats import Format
from ssdtune.kernels.quantize_affine import WHOLE_ZERO_BITS, quantize_affine
from ssdtune.kernels.rotated import Rotated, rotated
from ssdtune.kernels.unpack import unpack

every_suffix = pytest.mark.parametrize("suffix", SUFFIXES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))


def hadamard(n: int) -> torch.Tensor:
    """Sylvester's matrix, float32 [n, n]."""
    made = torch.ones(1, 1)
    while len(made) < n:
        made = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), made)
    return made


def error(values: torch.Tensor, bits: int, *, is_rotated: bool) -> float:
    """Squared, relative, of what comes back of values."""
    affine = Affine(bits, ORDERS[bits])
    format: Format = Rotated(affine) if is_rotated else affine
    made = quantize_affine(values, affine.order, is_rotated=is_rotated)
    out = torch.empty_like(values)
    format.by_torch([made[part.suffix] for part in format.parts(tuple(values.shape))], out)
    return float((out - values).square().sum() / values.square().sum())


@pytest.mark.parametrize("group", GROUPS)
def test_sums_and_differences_are_the_product_with_the_matrix(group: int) -> None:
    """Of whole numbers all sums are exact; a last group that is not whole stays as it is."""
    values = torch.randint(-99, 99, (5 * group + 7,)).float()
    found = rotated(values, group)
    exact = values[: 5 * group].view(5, group) @ hadamard(group)
    assert torch.equal(found[: 5 * group].view(5, group), exact * group**-0.5)
    assert torch.equal(found[5 * group :], values[5 * group :])
    assert torch.allclose(rotated(found, group), values, atol=1e-4)


def test_a_group_by_hand() -> None:
    """(q - z) s is 2 in the first place and 0 elsewhere: its rotation is 2 / 8 everywhere."""
    codes = torch.full((256,), 0x11, dtype=torch.uint8)
    codes[0] = 0x12  # element 0 has the code 2, all others have 1
    zeros = torch.full((8,), 23, dtype=torch.uint8)  # z = (23 + 1/2) / 16 - 1/2 = 0.96875
    scales = torch.full((8,), 64.0, dtype=torch.bfloat16)
    out = torch.empty(TILE)
    unpack(Rotated(Affine(4, (4,))), [codes, scales, zeros], out)
    first = torch.full((64,), 2.0)  # 1/32 x 64 in each place
    first[0] += 64
    assert torch.equal(out[:64], hadamard(64) @ first / 8)
    assert out[64:].view(7, 64)[:, 0].eq(16).all()
    assert out[64:].view(7, 64)[:, 1:].eq(0).all()


@every_dtype
@every_suffix
@pytest.mark.parametrize("group", GROUPS)
def test_native_code_has_the_definitions_bits(
    group: int, suffix: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bits, bound in ((2, 0), (3, 1 << 40), (4, 0), (8, 0)):
        monkeypatch.setattr(decoding, "STREAM_BYTES", bound)
        format = Rotated(Affine(bits, ORDERS[bits], group))
        for size in (1, group - 1, group, TILE + group + 5, STRETCH, 3 * STRETCH + 77):
            assert not differing(format, size, dtype, suffix), (bits, size)


@every_dtype
@every_suffix
def test_a_scale_that_is_no_number_spoils_its_group_alone(suffix: str, dtype: torch.dtype) -> None:
    format = Rotated(Affine(4, (4,)))
    parts = packed(format, 4 * 64)
    parts[1][1], parts[1][3] = math.nan, math.inf
    expected, found = torch.empty(256, dtype=dtype), torch.empty(256, dtype=dtype)
    format.by_torch(parts, expected)
    unpack(format, parts, found, suffix=suffix)
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number], expected[number])
    assert found[64:128].isnan().all()
    assert number[:64].all()
    if dtype == torch.bfloat16:
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rotation_helps_where_groups_have_outliers_and_there_alone(bits: int) -> None:
    normal = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    plain, turned = (error(normal, bits, is_rotated=r) for r in (False, True))
    least = 0.88 if bits == WHOLE_ZERO_BITS else 0.97  # rotated groups have any zeros
    assert least < turned / plain < 1.03, "rotated normal numbers are normal numbers"
    wild = normal.clone()
    wild[:, 7] *= 20
    assert error(wild, bits, is_rotated=True) < 0.6 * error(wild, bits, is_rotated=False)
