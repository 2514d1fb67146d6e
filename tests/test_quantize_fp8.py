"""The FP8 encoder: nearest codes for each block's own scale, at any shape and magnitude; files like DeepSeek's."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from test_foreign import FP8, WEIGHT, only

from ssdtune.kernels import quantize_fp8 as encoder
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.quantize import decoded
from ssdtune.kernels.quantize_fp8 import quantize_fp8
from ssdtune.swap.pack_header import OWN_FP8

BLOCK = (32, 64)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def fp8(values: torch.Tensor, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    return decoded(ScaledBytes(block), quantize_fp8(values, block), tuple(values.shape))


@pytest.mark.parametrize("shape", [(1, 1), (32, 64), (33, 65), (70, 200), (3, 40, 100), (0, 64)])
@pytest.mark.parametrize("columns", [64, 1 << 11], ids=["block by block", "rows of blocks"])
def test_each_block_has_its_largest_magnitude_at_the_largest_code(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], columns: int
) -> None:
    monkeypatch.setattr(encoder, "COLUMNS", columns)
    values = normal(*shape) * 10.0 ** torch.linspace(-6, 2, shape[-1])
    made = quantize_fp8(values, BLOCK)
    format = ScaledBytes(BLOCK)
    assert [tuple(made[p.suffix].shape) for p in format.parts(shape)] == [
        p.shape for p in format.parts(shape)
    ]
    for matrix, codes, scales in format.matrices((made["codes"], made["scales"]), values):
        for i, j in itertools.product(*map(range, scales.shape)):
            place = slice(32 * i, 32 * i + 32), slice(64 * j, 64 * j + 64)
            block = matrix[place]
            assert scales[i, j] == block.abs().max() / 448
            expected = (block / scales[i, j]).to(torch.float8_e4m3fn)
            assert torch.equal(codes[place].float(), expected.float())
            assert expected.float().abs().max() == 448


def test_codes_are_the_nearest_of_all() -> None:
    values = normal(20, 50)
    made = quantize_fp8(values, (20, 50))
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    scaled = values / made["scales"]
    nearest = (scaled.unsqueeze(-1) - every).abs().amin(-1)
    assert torch.equal((scaled - made["codes"].float()).abs(), nearest)


def test_it_is_what_the_reader_of_deepseeks_files_reads(tmp_path: Path) -> None:
    values = normal(200, 300)
    made = quantize_fp8(values, OWN_FP8.block)
    files = {".weight": made["codes"], ".weight_scale_inv": made["scales"]}
    entry = only(tmp_path, FP8 | {"weight_block_size": [128, 128]}, files)
    assert (entry.name, entry.format) == (WEIGHT, OWN_FP8)
    error = (fp8(values, OWN_FP8.block) - values).square().sum() / values.square().sum()
    assert 5e-4 < error < 9e-4


def test_an_outlier_costs_its_own_block_alone() -> None:
    values = normal(64, 128) * 1e-3
    before = fp8(values)
    values[3, 70] = 1e4
    after = fp8(values)
    assert after[3, 70] == values[3, 70]
    assert torch.equal(after[:, :64], before[:, :64])
    assert torch.equal(after[32:], before[32:])


@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-39, 1e-33, 1e30, 3.4e38])
def test_nothing_becomes_infinite_or_no_number(magnitude: float) -> None:
    values = normal(40, 100) / normal(40, 100).abs().max() * magnitude
    found = fp8(values)
    assert found.bfloat16().isfinite().all()
    assert found.abs().max() <= magnitude
    if magnitude > 1e-34:
        found, values = found.double(), values.double()
        assert (found - values).norm() < 0.04 * values.norm()


def test_what_is_no_number_is_refused_and_any_dtype_taken() -> None:
    values = normal(40, 100)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        given = values.to(dtype).requires_grad_()
        made, expected = quantize_fp8(given, BLOCK), quantize_fp8(given.detach().float(), BLOCK)
        assert all(made[s].float().equal(expected[s].float()) for s in expected)
    turned = values.t()
    assert torch.equal(fp8(turned), fp8(turned.contiguous()))
    values[3, 4] = values[7, 9] = math.nan
    with pytest.raises(ValueError, match=r"^2 of 4,000 values"):
        quantize_fp8(values, BLOCK)
