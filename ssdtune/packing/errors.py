"""What each width costs each tensor: the relative squared error of its weights, by a sample of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ssdtune.kernels.affine import ORDERS, Affine
from ssdtune.kernels.quantize import decoded, quantize_affine
from ssdtune.packing.layout import Group, PackError
from ssdtune.packing.reading import GroupReader
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.storage import Storage

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
# A sample is runs of neighbours, spread evenly: 65,536 squared errors, of 1,024 groups of 64, whose mean is known to
# some percent. The next width has a quarter of it.
RUN, NUM_RUNS = 4096, 16
Errors = Mapping[str, Mapping[int, float]]  # tensor -> width -> |decoded - w|^2 / |w|^2


def relative_errors(
    groups: Sequence[Group],
    group_size: int,
    storage: Storage,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Errors:
    """Of every tensor that `groups` would pack, at every one of WIDTHS; reads the model once, two groups in memory.

    group_size: elements that share a scale. on_progress: told how many bytes of the source are done. Raises PackError
    that names a tensor whose values are no numbers.
    """
    errors: dict[str, dict[int, float]] = {}
    with ReaderPool(storage) as pool:
        for group, values in GroupReader(pool, storage.alignment).read(groups):
            for name in group.formats:
                sample = sampled(values[name])
                try:
                    errors[name] = {
                        bits: relative_error(sample, affine(bits, group_size)) for bits in WIDTHS
                    }
                except ValueError as error:
                    raise PackError(f"{name} can't be packed: {error}") from error
            on_progress(sum(t.num_bytes for t in group.tensors))
    return errors


def affine(bits: int, group_size: int) -> Affine:
    """The format of a file that is read at this width alone."""
    return Affine(bits, (8,) if bits == 8 else ORDERS[bits], group_size, is_nested=False)


def sampled(values: torch.Tensor) -> torch.Tensor:
    """NUM_RUNS runs of RUN elements, float32, flat; all where there are no more. values: any shape, contiguous."""
    flat = values.reshape(-1)
    if flat.numel() <= RUN * NUM_RUNS:
        return flat.float()
    last = flat.numel() - RUN
    firsts = [last * i // (NUM_RUNS - 1) // RUN * RUN for i in range(NUM_RUNS)]
    return torch.cat([flat[first : first + RUN] for first in firsts]).float()


def relative_error(values: torch.Tensor, format: Affine) -> float:
    """|decoded - values|^2 / |values|^2; 0 for zeros. values: float32, flat."""
    parts = quantize_affine(values, format.order, format.group, is_nested=format.is_nested)
    found = decoded(format, parts, tuple(values.shape))
    square = float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    error = float(torch.linalg.vector_norm(found.sub_(values), dtype=torch.float64)) ** 2
    return error / square if square else 0.0
