"""Activations in a byte each: the error that the definition allows, no drift where rounding is at random, and the
kernel's bits under Triton's interpreter. (On a GPU: tests/test_cuda.py.)"""

import itertools
import math

import pytest
import torch
from test_lossless import exit_code_of

from ssdtune.kernels.transfer import GROUPS, LARGEST, format_of, pack
from ssdtune.kernels.unpack import TRITON, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 128), (37, 200))  # less than a program's rows and more; groups that are cut


def normal(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(shape[1])
    sizes = torch.logspace(-3, 3, shape[0]).unsqueeze(1)
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def read_back(codes: torch.Tensor, scales: torch.Tensor, group: int, suffix: str) -> torch.Tensor:
    out = torch.empty(codes.shape)
    unpack(format_of(group), (codes, scales), out, suffix=suffix)
    return out


@pytest.mark.parametrize("group", GROUPS)
def test_nearest_codes_are_off_by_half_a_step_at_most(group: int) -> None:
    values = normal((37, 200))
    codes, scales = pack(values, group)
    steps = scales.repeat_interleave(group, dim=1)[:, :200]
    off = (read_back(codes, scales, group, "") - values).abs()
    assert (off <= 0.5001 * steps).all()
    largest = torch.nn.functional.pad(values.abs(), (0, -200 % group)).view(37, -1, group).amax(-1)
    assert torch.equal(scales, largest / LARGEST)
    assert codes.abs().amax() == LARGEST


def test_worked_out_by_hand() -> None:
    """A step of 1: ties go to even codes."""
    values = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5, 3.75, -127.0, 0.0]])
    codes, scales = pack(values, 32)
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[127, 0, 2, 0, -2, 4, -127, 0]]


def test_rounding_at_random_does_not_drift() -> None:
    """Codes are neighbours of the value, the upper one as often as it is near; another key, other codes."""
    values = torch.full((512, 128), 0.3)
    values[:, 0] = 127.0  # a step of 1
    codes, _ = pack(values, key=5)
    ups = codes[:, 1:].double()
    assert set(ups.unique().tolist()) == {0.0, 1.0}
    deviation = math.sqrt(0.3 * 0.7 / ups.numel())
    assert abs(float(ups.mean()) - 0.3) < 4 * deviation
    assert (codes[:, 0] == 127).all()
    assert torch.equal(pack(values, key=5)[0], codes)
    assert not torch.equal(pack(values, key=6)[0], codes)


def check_no_numbers(suffix: str) -> None:
    values = normal((4, 96))
    values[1, 40], values[2, 70], values[3, :32] = math.nan, -math.inf, 0.0
    found = read_back(*pack(values, 32, suffix=suffix), 32, suffix)
    is_none = torch.zeros(4, 96, dtype=torch.bool)
    is_none[1, 32:64] = is_none[2, 64:] = True
    assert torch.equal(found.isnan(), is_none)
    assert (found[3, :32] == 0).all()


def test_what_is_no_number_spoils_its_group_alone() -> None:
    check_no_numbers("")


def check_kernel() -> None:
    """Where TRITON_INTERPRET is set before Triton is imported: what its own library is made of is interpreted too."""
    check_no_numbers(TRITON)
    every = itertools.product(DTYPES, (None, 2**63 + 2**31 + 5))
    for (dtype, key), group in zip(every, itertools.cycle(GROUPS), strict=False):
        for shape in SHAPES:
            values = normal(shape, dtype)
            values.view(-1)[0] = 1e-41  # float32 has it below its normal numbers, float16 not
            expected = pack(values, group, key=key, suffix="")
            found = pack(values, group, key=key, suffix=TRITON)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1].view(torch.int32), expected[1].view(torch.int32))
            assert torch.equal(read_back(*found, group, TRITON), read_back(*expected, group, ""))


def test_the_kernel_has_the_definitions_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert exit_code_of(check_kernel) == 0


def test_nothing_is_nothing() -> None:
    codes, scales = pack(torch.empty(0, 7))
    assert codes.shape == (0, 7)
    assert scales.shape == (0, 1)
