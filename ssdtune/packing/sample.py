"""What a lossless packing would save, from a few megabytes of the model's own weights."""

from __future__ import annotations

import torch

from ssdtune.kernels import lossless
from ssdtune.kernels.lossless import Lossless
from ssdtune.packing.layout import is_worth_packing
from ssdtune.swap.header import TensorEntry, opened, pread_exactly
from ssdtune.visit.build import MetaModel

NUM_TENSORS = 4  # spread over the model
MOST_VALUES = 1 << 20  # of each, from its middle


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
    start = entry.start + (entry.num_bytes - num_bytes) // 4 * 2
    with opened(entry.path) as fd:
        raw = pread_exactly(entry.path, fd, num_bytes, start)
    return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16)
