"""Ties of a model's weights: as its config says, except where the files hold two different tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ssdtune.swap.header import TensorEntry
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.source import Checkpoint
from ssdtune.visit.asked import BuildError
from ssdtune.visit.placement import FILE_DTYPES, plain_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPARED_AT_A_TIME = 1 << 20  # elements


def tie(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Ties as the config says, except where the files hold two different tensors.

    That is from_pretrained's rule: a config that ties what was trained apart is wrong.
    """
    tied = dict(model.all_tied_weights_keys)
    if not tied:
        return
    shapes = {tuple(model.get_parameter_or_buffer(name).shape) for name in tied}
    candidates = [e.name for e in checkpoint.tensors.values() if tuple(e.shape) in shapes]
    found = plain_targets(model, candidates)
    for target, source in tied.items():
        if target not in found or source not in found:
            continue
        one, other = (checkpoint.tensors[found[name]] for name in (target, source))
        dtype = model.get_parameter_or_buffer(source).dtype
        if one != other and not _equal_on_disk(one, other, dtype):
            warnings.warn(
                f"the config ties {target} to {source}, but the files hold two different tensors: "
                "they are not tied. Set tie_word_embeddings to false in config.json.",
                stacklevel=2,
            )
            model.all_tied_weights_keys.pop(target)
    model.tie_weights(missing_keys=set(model.all_tied_weights_keys), recompute_mapping=False)


def _equal_on_disk(
    one: TensorEntry | PackedEntry, other: TensorEntry | PackedEntry, dtype: torch.dtype
) -> bool:
    """Whether two file tensors have the same values in `dtype`, a few megabytes at a time. Packed ones have if they are
    packed alike."""
    if tuple(one.shape) != tuple(other.shape):
        return False
    if isinstance(one, PackedEntry) or isinstance(other, PackedEntry):
        return (
            isinstance(one, PackedEntry)
            and isinstance(other, PackedEntry)
            and one.format == other.format
            and all(
                _equal_on_disk(a, b, FILE_DTYPES[a.dtype])
                for a, b in zip(one.parts, other.parts, strict=True)
            )
        )
    chunks = zip(_values(one, dtype), _values(other, dtype), strict=True)
    return all(torch.equal(a, b) for a, b in chunks)


def _values(entry: TensorEntry, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    stored = FILE_DTYPES[entry.dtype]
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        left = entry.num_bytes
        while left:
            raw = file.read(min(left, COMPARED_AT_A_TIME * stored.itemsize))
            if not raw:
                raise BuildError(
                    f"{entry.path} ends inside {entry.name}: {left} bytes are missing."
                )
            left -= len(raw)
            yield torch.frombuffer(bytearray(raw), dtype=stored).to(dtype)
