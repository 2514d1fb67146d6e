"""How much the loss on a text depends on each tensor: the mean Fisher information of its weights, in one training pass of
the streamed model without an update.

Weights that are off by D raise a trained model's loss by about half of the sum of D^2 times its second derivatives
(LeCun, Denker and Solla, "Optimal Brain Damage", 1989: the terms of first order and off the diagonal left out). For those
stand squares of gradients, as in SqueezeLLM (Kim et al., arXiv 2306.07629). A layer y = W x has, of one token, the
gradient g x^T, where g is the loss's by y: the mean square over W's elements is |g|^2 |x|^2 / numel. Tokens are counted
each by itself. At few bits the loss grows by far more than that (arXiv 2503.01901): it compares tensors, no more.

The inputs alone, |x|^2, do not do, since layers differ by what becomes of them: of SmolLM2's sum, the head and three
down projections are nine tenths, one of these by the first token of each text alone (massive activations, Sun et al.,
arXiv 2402.17762), and widths so chosen cost more than such by the weights' errors (`benchmarks/README.md`, "Widths by
tensor").

Both are seen where weights meet them, in matrix products: x in forward, g in backward, whatever the model's code calls
them by. The rows of a table that is looked up get the gradient of the hidden states that they begin. The experts of a
stack share one mean.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssdtune.fidelity.text import Text
from ssdtune.packing.layout import PackError
from ssdtune.visit.build import MetaModel
from ssdtune.visit.placement import Piece, place
from ssdtune.visit.streamer import Streamer

# Operators that multiply two of their arguments, and the place of the first of them. The last is transformers' own, for
# processors that lack the one before it.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_grouped_mm": 0, "grouped_mm_fallback": 0}
FALLBACK_BACKWARD = "grouped_mm_fallback_backward"  # of (input, weight, offsets, gradient)
# What a row's gradients are multiplied with: its loss is a mean over so many tokens.
_count: contextvars.ContextVar[int] = contextvars.ContextVar("tokens in the row's loss")


def fisher(model: Any, meta: MetaModel, text: Text) -> dict[str, float]:
    """Of each file tensor, by name, the mean over its elements of squared gradients, summed over tokens; those that no
    product meets are left out.

    model: streamed, nothing in it trains. meta: the same one, as `build_meta` has it. Memory: that of a training step
    with all rows as its micro-batches.
    """
    streamer: Streamer = model.ssdtune
    sums: dict[str, float] = {}
    watch = _Watch(streamer, sums)
    model.eval()
    with torch.enable_grad(), _first_states_watched(model, watch):
        rows = zip(text.batches_for(model), text.counts, strict=True)
        losses = streamer.run([partial(_loss, model, row, count, watch) for row, count in rows])
        with watch:
            torch.stack(losses).sum().backward()
    found: dict[str, float] = {}
    tensors = meta.checkpoint.tensors
    for name, placement in place(meta.model, tensors).items():
        if name not in sums:
            continue
        for piece in placement.pieces:
            # A file tensor that several parameters are cut from has each one's mean for its part.
            share = _numel(piece, placement.shape) / math.prod(tensors[piece.source].shape)
            mean = sums[name] / math.prod(placement.shape)
            found[piece.source] = found.get(piece.source, 0.0) + share * mean
    return found


def _numel(piece: Piece, shape: tuple[int, ...]) -> int:
    """Elements of the parameter, of that shape, that the piece fills."""
    if piece.target_slices is None:
        return math.prod(shape)
    return math.prod(stop - start for start, stop in piece.target_slices)


def check_seen(wanted: Sequence[str], found: Mapping[str, float], text: Text) -> None:
    """Raises PackError that names a tensor whose gradients the text has not shown, or that are no numbers."""
    endless = [name for name in wanted if not math.isfinite(found.get(name, 0.0))]
    if endless:
        raise PackError(
            f"--text {text.name}: the gradients of {len(endless)} tensors are infinite or no numbers ({endless[0]}, …): "
            "the model overflows on it.\n"
            "Give another text, or leave out --text: tensors then count by their number of weights."
        )
    unseen = [name for name in wanted if not found.get(name)]
    if unseen:
        raise PackError(
            f"--text {text.name}: the gradients of {len(unseen)} tensors were not seen ({unseen[0]}, …): no row comes "
            "to them, or they are used in another way than by matrix products.\n"
            "Leave out --text: tensors then count by their number of weights."
        )


def _loss(model: Any, row: Mapping[str, Any], count: int, watch: _Watch) -> torch.Tensor:
    """Runs in a context of its own, which recomputing in backward enters again."""
    _count.set(count)
    with watch:
        return model(**row).loss


@contextmanager
def _first_states_watched(model: Any, watch: _Watch) -> Iterator[None]:
    """Gradients come back as far as to what the embedding hands out, and are seen there."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        count = _count.get()
        output = output.detach().requires_grad_(True)
        output.register_hook(lambda gradient: watch.see_first(gradient, count))
        return output

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Watch(TorchDispatchMode):
    """Adds to `sums`, by parameter, the squares of its gradients."""

    def __init__(self, streamer: Streamer, sums: dict[str, float]) -> None:
        super().__init__()
        self._streamer, self._sums = streamer, sums
        self._waiting: dict[str, list[torch.Tensor]] = {}  # squares of inputs, until backward
        self._visit = 0
        self._tables: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at the operator's arguments, and runs it."""
        operator = func._schema.name.partition("::")[2]
        # A graph's own operators run without a graph; recomputing, which backward does too, makes one.
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        for weight, factor, axis in _factors(operator, args):
            name = self._name_of(weight)
            if name is None:
                continue
            if not factor.is_floating_point():
                self._tables.add(name)
            elif in_backward:
                self._see_gradient(name, _squares(factor, axis))
            else:
                self._see_input(name, _squares(factor, axis) * _count.get() ** 2)
        return func(*args, **(kwargs or {}))

    def see_first(self, gradient: torch.Tensor, count: int) -> None:
        """Of what tables handed out, as if the first hidden states were a sum of them: each token has a row of each."""
        square = float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2 * count**2
        for name in self._tables:
            self._sums[name] = self._sums.get(name, 0.0) + square

    def _see_input(self, name: str, squares: torch.Tensor) -> None:
        """The last of a visit is the first that a gradient comes to. What an earlier visit left (forward is run again
        in backward) is forgotten."""
        if self._visit != len(self._streamer.observed):
            self._visit = len(self._streamer.observed)
            self._waiting.clear()
        self._waiting.setdefault(name, []).append(squares)

    def _see_gradient(self, name: str, squares: torch.Tensor) -> None:
        waiting = self._waiting.get(name)
        if waiting and len(waiting[-1]) == len(squares):
            self._sums[name] = self._sums.get(name, 0.0) + float(waiting.pop() @ squares)

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
    """Yields pairs that are multiplied: what may be a weight, what is then its input or its output's gradient, and the
    axis of the latter that is summed over. operator: its name, without a namespace."""
    if operator == "embedding":
        yield args[0], args[1], 0
    elif operator == FALLBACK_BACKWARD:
        yield args[1], args[3], -1
    elif operator in PRODUCTS:
        left, right = args[PRODUCTS[operator] :][:2]
        yield right, left, -1
        yield left, right, -2


def _squares(factor: torch.Tensor, axis: int) -> torch.Tensor:
    """Of each token's vector: float64, flat."""
    return torch.linalg.vector_norm(factor, dim=axis, dtype=torch.float64).square().flatten()
