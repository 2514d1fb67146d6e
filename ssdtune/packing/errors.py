"""What each width costs each tensor: the relative squared error of its weights, by a sample of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from ssdtune.kernels.affine import ORDERS, Affine
from ssdtune.kernels.encode import quantized
from ssdtune.kernels.nibbles import Nibbles
from ssdtune.kernels.quantize import decoded
from ssdtune.packing.layout import Group, unpackable
from ssdtune.packing.sample import sample_of
from ssdtune.packing.squares import Squares

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
# 65,536 squared errors, of 1,024 groups of 64, whose mean is known to some percent. The next width has a quarter of it.
NUM_RUNS = 16
DIGITS = 6  # of an error that count: what sums round to on another number of threads must not change a choice
Errors = Mapping[int, float]  # width -> |decoded - w|^2 / |w|^2


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """Of a tensor, by a sample. errors: by width. mean_square: of its weights."""

    errors: Errors
    mean_square: float


def sampled_errors(
    groups: Sequence[Group], group_size: int, on_progress: Callable[[], object] = lambda: None
) -> dict[str, Sampled]:
    """Of every tensor that `groups` would pack, at every one of WIDTHS; reads samples alone.

    group_size: elements that share a scale. on_progress: told of each tensor that is done. Raises PackError that names a
    tensor whose values are no numbers.
    """
    found: dict[str, Sampled] = {}
    for entry in (t for group in groups for t in group.tensors if t.name in group.formats):
        sample = sample_of(entry, NUM_RUNS)
        try:
            errors = {bits: relative_error(sample, affine(bits, group_size)) for bits in WIDTHS}
        except ValueError as error:
            raise unpackable(entry.name, error) from error
        found[entry.name] = Sampled(errors, float(sample.double().square().mean()))
        on_progress()
    return found


def rounded(error: float) -> float:
    """To DIGITS."""
    return float(f"{error:.{DIGITS}g}")


def affine(bits: int, group_size: int) -> Affine:
    """The format of a file that is read at this width alone."""
    return Affine(bits, (8,) if bits == 8 else ORDERS[bits], group_size, is_nested=False)


def relative_error(values: torch.Tensor, format: Affine) -> float:
    """|decoded - values|^2 / |values|^2; 0 for zeros. values: float32, flat."""
    return errors_by_width([values], format)[0][format.bits]


def widths_read(format: Affine | Nibbles) -> tuple[int, ...]:
    """That a file of this format can be read at, ascending."""
    return format.readings if isinstance(format, Affine) else (4,)


def errors_by_width(
    samples: Sequence[torch.Tensor], format: Affine | Nibbles
) -> list[dict[int, float]]:
    """The same of each sample, for each width that the format, all bits of it, can be read at. samples: float32, flat;
    encoded together, since an encoder's calls cost more than some thousand values. Raises ValueError for what is no
    number."""
    is_affine = isinstance(format, Affine)
    # Groups are encoded each by itself; zeros change no group's range, which has 0 in it.
    group = format.group if is_affine else format.block
    filled = [torch.nn.functional.pad(s, (0, -s.numel() % group)) for s in samples]
    values = torch.cat(filled)
    parts = quantized(values, format)
    errors: list[dict[int, float]] = [{} for _ in samples]
    for bits in widths_read(format):
        reading = dataclasses.replace(format, bits=bits) if is_affine else format
        found = decoded(reading, parts, tuple(values.shape)).split([f.numel() for f in filled])
        for own, one, sample in zip(errors, found, samples, strict=True):
            own[bits] = Squares.of(one[: sample.numel()], sample).relative
    return errors
