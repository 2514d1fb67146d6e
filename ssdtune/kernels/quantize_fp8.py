"""Encoder: float weights to e4m3 with a scale for each block of a matrix, as DeepSeek and Qwen publish theirs.

    scale = largest magnitude of the block / 448        code = the e4m3 number nearest to w / scale, ties to even

448 is e4m3's largest number (DeepSeek-V3, arXiv 2412.19437, 3.3; blocks of 128 x 128 for weights). No scale is searched
for, as with four bits: steps of a float shrink with its magnitude, so that the scale matters little.
"""

from __future__ import annotations

import itertools

import torch

from ssdtune.kernels.apart import in_order
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.quantize import LARGEST, SMALLEST, refuse_what_is_no_number

E4M3_LARGEST = 448.0
COLUMNS = 2048  # at a time, about; with 128 rows of them 1 MB in float32


def quantize_fp8(values: torch.Tensor, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The parts of `ScaledBytes(block)`: codes, of the values' shape, and float32 scales.

    values: [..., rows, columns], floating, on any device, taken as float32. A block whose scale would be below 2^-126
    becomes zeros, with a scale of 0; no finite value becomes infinite. Raises ValueError, naming their number, where
    values are not finite.
    """
    refuse_what_is_no_number(values.detach().reshape(-1))
    format = ScaledBytes(block)
    dtypes = (torch.float8_e4m3fn, torch.float32)
    parts = [
        torch.empty(part.shape, dtype=dtype, device=values.device)
        for part, dtype in zip(format.parts(tuple(values.shape)), dtypes, strict=True)
    ]
    for matrix, codes, scales in format.matrices(parts, values.detach()):
        _encode(matrix, codes, scales, block)
    return dict(zip(("codes", "scales"), parts, strict=True))


def _encode(
    matrix: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> None:
    """One matrix, a row of blocks and some columns of it at a time."""
    tall, wide = block
    step = max(1, COLUMNS // wide)  # blocks

    def encode(place: tuple[int, int]) -> None:
        row, first = place
        rows = slice(row * tall, (row + 1) * tall)
        columns = slice(first * wide, (first + step) * wide)
        piece = matrix[rows, columns].float()
        # The last block is filled up with zeros, which are no largest magnitude.
        blocks = torch.nn.functional.pad(piece, (0, -piece.shape[1] % wide)).unflatten(
            1, (-1, wide)
        )
        scale = blocks.abs().amax((0, 2)).clamp_(max=LARGEST) / E4M3_LARGEST
        scale = torch.where(scale < SMALLEST, 0.0, scale)
        scales[row, first : first + step] = scale
        scaled = blocks / torch.where(scale > 0, scale, torch.inf).unsqueeze(1)
        made = scaled.clamp_(-E4M3_LARGEST, E4M3_LARGEST).flatten(1)[:, : piece.shape[1]]
        codes[rows, columns] = made.to(torch.float8_e4m3fn)

    places = [*itertools.product(range(scales.shape[0]), range(0, scales.shape[1], step))]
    for _ in in_order(encode, places, matrix.device):
        pass
