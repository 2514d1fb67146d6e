"""Rows of codes with their zeros and scales in float32: to this form native code and Triton's kernels bring what
integers.py and float8.py define.

    out[o, i] = (codes[o, i] - zeros[o, g(i)]) * scales[o, g(i)]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.integers import Awq, Gptq, PackQuantized, num_groups, row_slices

# Scales that are brought to float32 before rows are decoded by them: 2 MB, and as much of zeros.
NUM_SCALES = 1 << 19
Words = Gptq | Awq | PackQuantized
ALONG, ACROSS, AWQ, INT8, FP8 = range(5)  # as integers.c numbers them, and says what they are
LAYOUTS: dict[type, int] = {PackQuantized: ALONG, Gptq: ACROSS, Awq: AWQ}
FORMATS = (Gptq, Awq, PackQuantized, ScaledBytes)
BYTES = {"I8": INT8, "F8_E4M3": FP8}


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """A few rows of a matrix. out: [rows, columns], contiguous. codes: begins with what the first row is made of.
    stride: from one line of codes to the next, in words or bytes. zeros, scales: float32 [rows, groups], contiguous.
    order: int32, each column's group; None: its number // group."""

    out: torch.Tensor
    codes: torch.Tensor
    stride: int
    zeros: torch.Tensor
    scales: torch.Tensor
    order: torch.Tensor | None
    group: int
    bits: int
    layout: int


def rows_of(
    format: Words | ScaledBytes, parts: Sequence[torch.Tensor], out: torch.Tensor
) -> Iterator[Rows]:
    """All rows of a tensor, as many at a time as NUM_SCALES allows."""
    if isinstance(format, ScaledBytes):
        return _of_bytes(format, parts, out)
    return _of_words(format, parts, out)


def _of_words(format: Words, parts: Sequence[torch.Tensor], out: torch.Tensor) -> Iterator[Rows]:
    words, layout = parts[0], LAYOUTS[type(format)]
    order = parts[-1] if format.is_ordered else None
    per_word = 8 if layout == AWQ else 1  # rows
    groups = num_groups(out.shape[1], format.group)
    for some in row_slices(len(out), groups, NUM_SCALES):
        codes = words[some.start :] if layout == ALONG else words[:, some.start // per_word :]
        zeros, scales = (x.float().contiguous() for x in format.scaling(parts, some))
        stride, group, bits = words.shape[1], format.group, format.bits
        yield Rows(out[some], codes, stride, zeros, scales, order, group, bits, layout)


def _of_bytes(
    format: ScaledBytes, parts: Sequence[torch.Tensor], out: torch.Tensor
) -> Iterator[Rows]:
    layout = BYTES[format.codes]
    for matrix, codes, *of_blocks in format.matrices(parts, out):
        for some in row_slices(len(matrix), of_blocks[0].shape[1], NUM_SCALES):
            zeros, scales = format.scaling(of_blocks, some)
            stride, group = out.shape[-1], format.block[1]
            yield Rows(matrix[some], codes[some], stride, zeros, scales, None, group, 8, layout)
