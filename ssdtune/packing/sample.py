"""A few of a model's own weights, straight from its files: enough to say what a packing would do to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssdtune.kernels import lossless
from ssdtune.kernels.formats import Part
from ssdtune.kernels.lossless import Lossless
from ssdtune.packing.layout import is_worth_packing, part_bytes
from ssdtune.swap.header import TensorEntry, opened, pread_exactly
from ssdtune.swap.packed import PackedEntry
from ssdtune.visit.build import MetaModel
from ssdtune.visit.placement import FILE_DTYPES

NUM_TENSORS = 4  # spread over the model
MOST_VALUES = 1 << 20  # of each, from its middle
RUN = 4096  # neighbours that are looked at together
NUM_RUNS = 4  # of a tensor's sample, spread evenly: 256 groups of 64


def lossless_ratio(meta: MetaModel) -> float | None:
    """Bytes of weights over those that they would take as `quantization: lossless`, measured on a sample; None where no
    tensor is worth packing so. Reads up to 8 MB. Raises CheckpointError where a file can't be read."""
    format = Lossless(bits=4, num_escapes=0)
    entries = [
        entry
        for entry in meta.checkpoint.tensors.values()
        if isinstance(entry, TensorEntry) and is_worth_packing(entry, format)
    ]
    before = after = 0
    for entry in entries[:: max(1, len(entries) // NUM_TENSORS)][:NUM_TENSORS]:
        values = _middle(entry)
        found = lossless.encode(values)
        before += values.nbytes
        after += values.nbytes if found is None else found[0].num_bytes(tuple(values.shape))
    return before / after if after else None


def _middle(entry: TensorEntry) -> torch.Tensor:
    """Values of a bfloat16 tensor, flat."""
    num_bytes = min(2 * MOST_VALUES, entry.num_bytes)
    first = (entry.num_bytes - num_bytes) // 4 * 2
    return _read(entry, [range(first, first + num_bytes)])


def runs_of(num_elements: int, num_runs: int) -> list[range]:
    """Elements of a sample: so many runs of RUN, spread evenly, each beginning at a multiple of RUN; all of them where
    there are no more."""
    if num_elements <= RUN * num_runs:
        return [range(num_elements)]
    last = num_elements - RUN
    firsts = [last * i // (num_runs - 1) // RUN * RUN for i in range(num_runs)]
    return [range(first, first + RUN) for first in firsts]


def sample_of(entry: TensorEntry | PackedEntry, num_runs: int = NUM_RUNS) -> torch.Tensor:
    """So many runs of a tensor's values, decoded where it is packed, float32, flat; the same elements either way.

    Reads just those. A packed tensor's parts are affine codes of any kind. Raises CheckpointError.
    """
    numel = torch.Size(entry.shape).numel()
    runs = runs_of(numel, num_runs)
    if isinstance(entry, TensorEntry):
        size = FILE_DTYPES[entry.dtype].itemsize
        return _read(entry, [range(run.start * size, run.stop * size) for run in runs]).float()
    out = torch.empty(sum(len(run) for run in runs))
    of_a_run = entry.format.parts((RUN,))
    parts = [
        _read(stored, _bytes_of(runs, part, stored))
        for stored, part in zip(entry.parts, of_a_run, strict=True)
    ]
    entry.format.by_torch(parts, out)
    return out


def _bytes_of(runs: Sequence[range], part: Part, stored: TensorEntry) -> list[range]:
    """Where a part has the elements of runs, each of which begins at a multiple of RUN. part: of one run alone."""
    if len(runs) == 1:
        return [range(stored.num_bytes)]
    size = part_bytes(part)
    return [range(run.start // RUN * size, run.stop // RUN * size) for run in runs]


def _read(entry: TensorEntry, spans: Sequence[range]) -> torch.Tensor:
    """The bytes of those spans of a tensor, as its elements, flat."""
    with opened(entry.path) as fd:
        raw = [pread_exactly(entry.path, fd, len(s), entry.start + s.start) for s in spans]
    return torch.frombuffer(bytearray(b"".join(raw)), dtype=FILE_DTYPES[entry.dtype])
