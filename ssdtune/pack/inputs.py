"""What weights are multiplied with on a text: the mean square of each tensor's inputs, in one pass of the streamed model.

A layer y = W x whose weights are off by D puts out D x more; where D is as good as random, the square of that is on
average |D|^2 times the mean square of x's elements, summed over outputs. So a tensor's squared error, weighted by the
mean square of its inputs, is what its output is off by on this text, a token. It says nothing of what later layers make
of that.

Inputs are seen where weights meet them: in matrix products and lookups (a token's input of an embedding has one 1 among
zeros), whatever the model's code calls them by. The experts of a stack share one mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssdtune.pack.text import Text
from ssdtune.packing.layout import PackError
from ssdtune.visit.build import MetaModel
from ssdtune.visit.placement import Piece, place
from ssdtune.visit.streamer import Streamer

# Operators that multiply two of their arguments, and the place of the first of them. The last is transformers' own, for
# processors that lack the one before it.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_grouped_mm": 0, "grouped_mm_fallback": 0}


def mean_squares(model: Any, meta: MetaModel, text: Text) -> dict[str, float]:
    """Of the inputs of each file tensor, a token of the text, by name; those that no product meets are left out.

    model: streamed. meta: the same one, as `build_meta` has it. Memory: the streamed model's, and the hidden states of all
    rows.
    """
    streamer: Streamer = model.ssdtune
    sums: dict[str, float] = {}
    model.eval()
    with torch.no_grad():
        streamer.run([partial(_seen, model, row, sums) for row in text.batches_for(model)])
    found: dict[str, float] = {}
    tensors = meta.checkpoint.tensors
    for name, placement in place(meta.model, tensors).items():
        if name not in sums:
            continue
        num_stacked = placement.shape[0] if len(placement.shape) > 2 else 1
        mean = sums[name] / text.num_tokens / num_stacked
        for piece in placement.pieces:
            # A file tensor that several parameters are cut from has each one's mean for its part.
            share = _numel(piece, placement.shape) / math.prod(tensors[piece.source].shape)
            found[piece.source] = found.get(piece.source, 0.0) + share * mean
    return found


def _numel(piece: Piece, shape: tuple[int, ...]) -> int:
    """Elements of the parameter, of that shape, that the piece fills."""
    if piece.target_slices is None:
        return math.prod(shape)
    return math.prod(stop - start for start, stop in piece.target_slices)


def check_seen(wanted: Sequence[str], found: Mapping[str, float], text: Text) -> None:
    """Raises PackError that names a tensor whose inputs the text has not shown."""
    unseen = [name for name in wanted if not found.get(name)]
    if unseen:
        raise PackError(
            f"--text {text.name}: the inputs of {len(unseen)} tensors were not seen ({unseen[0]}, …): no row comes to "
            "them, or they are used in another way than by matrix products.\n"
            "Leave out --text: tensors then count by their number of weights."
        )


def _seen(model: Any, row: Mapping[str, Any], sums: dict[str, float]) -> None:
    with _Watch(model.ssdtune, sums):
        model(**row)


class _Watch(TorchDispatchMode):
    """Adds to `sums`, by parameter, the squares of what it is multiplied with, divided by how many there are a token."""

    def __init__(self, streamer: Streamer, sums: dict[str, float]) -> None:
        super().__init__()
        self._streamer, self._sums = streamer, sums

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at the operator's arguments, and runs it."""
        for weight, inputs, axis in _factors(func._schema.name.partition("::")[2], args):
            name = self._name_of(weight)
            if name is not None:
                self._sums[name] = self._sums.get(name, 0.0) + _mean_square(weight, inputs, axis)
        return func(*args, **(kwargs or {}))

    def _name_of(self, tensor: torch.Tensor) -> str | None:
        """The parameter of the block under way that the tensor is, or is a part of."""
        streamer = self._streamer
        if not streamer.observed:
            return None
        start = tensor.data_ptr() - streamer.slot_memory().data_ptr()
        views = streamer.open_engine.recipes[streamer.observed[-1][0]].tensors
        found = (v.name for v in views if v.offset <= start < v.offset + v.num_bytes)
        return next(found, None)


def _factors(operator: str, args: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yields pairs that are multiplied: what may be a weight, what is then its input, and the axis of the latter that is
    summed over. operator: its name, without a namespace."""
    if operator == "embedding":
        yield args[0], args[1], 0
    elif operator in PRODUCTS:
        left, right = args[PRODUCTS[operator] :][:2]
        yield right, left, -1
        yield left, right, -2


def _mean_square(weight: torch.Tensor, inputs: torch.Tensor, axis: int) -> float:
    """Summed over tokens. inputs: values, or of an embedding numbers of rows."""
    if not inputs.is_floating_point():
        return inputs.numel() / weight.shape[0]
    return float(torch.linalg.vector_norm(inputs, dtype=torch.float64)) ** 2 / inputs.shape[axis]
