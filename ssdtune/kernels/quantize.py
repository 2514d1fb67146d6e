"""What the encoders share: they make packed formats of float weights by the weights alone, with no calibration data.

Affine codes: `quantize_affine.py`; four bits by a table: `quantize_nibbles.py`. Both minimise the squared error of each
group, and codes are always the nearest ones for scale and zero *as stored*. FP8, `quantize_fp8.py`, searches for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ssdtune.kernels.apart import in_order
from ssdtune.kernels.formats import Format, Part
from ssdtune.kernels.nibbles import SCALE_DTYPES

# Elements at a time: a temporary takes 2 MB, all of them less than 32 MB on each thread. With half of it calls take a
# tenth of the time, with twice as much the second cache is too small (2026-11-29).
CHUNK = 1 << 19
DTYPES = {"U8": torch.uint8, **SCALE_DTYPES}
NUM_REFITS = 2  # steps of alternating least squares
SMALLEST = 2.0**-126  # normal bfloat16 number; some processors take what is smaller for 0
LARGEST = 0.99 * torch.finfo(torch.bfloat16).max  # a decoded value may be; less what rounding adds
TINY = 1e-30  # where it takes part, a sum of squares of numbers near 1 is zero


def decoded(
    format: Format, made: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> torch.Tensor:
    """What the parts that an encoder made stand for, float32 of that shape, by the definition."""
    out = torch.empty(shape)
    format.by_torch([made[part.suffix] for part in format.parts(shape)], out)
    return out


def by_chunks(
    values: torch.Tensor,
    parts: Iterable[Part],
    chunk: int,
    encode: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The parts of all values, made of those that `encode` makes of so many of them at a time."""
    flat = values.detach().reshape(-1)
    refuse_what_is_no_number(flat)
    made = {
        part.suffix: torch.empty(part.shape, dtype=DTYPES[part.dtype], device=flat.device)
        for part in parts
    }
    ends = dict.fromkeys(made, 0)
    pieces = _pieces(flat, chunk)
    for found in in_order(lambda piece: encode(piece.float()), pieces, flat.device):
        for suffix, part in found.items():
            made[suffix][ends[suffix] : ends[suffix] + part.numel()] = part
            ends[suffix] += part.numel()
    return made


def in_rows(flat: torch.Tensor, size: int) -> list[torch.Tensor]:
    """[rows, size] and, where something is left, [1, rest]."""
    whole = flat.numel() // size * size
    parts = (flat[:whole].view(-1, size), flat[whole:].view(1, -1))
    return [part for part in parts if part.numel()]


def refuse_what_is_no_number(flat: torch.Tensor) -> None:
    """Raises ValueError that names their number. flat: of one dimension, any size."""
    bad = sum(in_order(_num_infinite, _pieces(flat, CHUNK), flat.device))
    if bad:
        raise ValueError(f"{bad:,} of {flat.numel():,} values are not finite numbers in float32.")


def _num_infinite(piece: torch.Tensor) -> int:
    """How many values are not finite in float32."""
    values = piece.float()
    ends = torch.stack(torch.aminmax(values))  # NaN where one of the values is
    # Looking at all of them takes ten times as long.
    return 0 if bool(ends.isfinite().all()) else int((~values.isfinite()).sum())


def _pieces(flat: torch.Tensor, size: int) -> Sequence[torch.Tensor]:
    """Of so many elements, the last of what is left; none of nothing."""
    return flat.split(size) if flat.numel() else ()


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent, float32, exact. exponent: int32, -126 to 127."""
    return (exponent + 127 << 23).view(torch.float32)
