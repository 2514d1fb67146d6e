"""The head and its loss as one block: logits exist for one chunk of tokens at a time.

The head's `forward` is replaced by one that returns `LazyLogits` (see `lazy_logits.py`), and every
`cross_entropy` over them comes here, whatever loss function called it: the model's own
(`ForCausalLMLoss` shifts, pads, counts and divides as its authors wrote it), a seq2seq model's, or
a user's. For each chunk of rows

    logits = value_ops(head(hidden[chunk]))
    loss  += cross_entropy(logits, target[chunk], reduction="sum") / number of targets (for a mean)
    d_hidden[chunk], d_parameters += gradient of that chunk's loss

and the chunk's logits are freed before the next one is made. Forward keeps the hidden states, their
gradient and the head's trainable parameters' gradients; backward only scales them.

Exact: a micro-batch whose tokens fit in one chunk goes through the very operators, on the very
shapes, of the unmodified model: same bits. More chunks equal the sum of the same chunks' losses,
each with its own backward, in ascending order; against the unmodified model they agree to rounding.

Gradients are made in forward for the `grad_output` that is expected. If another one comes, and it
differs by a power of two, scaling is exact; otherwise the chunks are recomputed with the true one.
"""

import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ssdtune.errors import SSDTuneError
from ssdtune.visit.lazy_logits import (
    LazyLogits,
    Node,
    Op,
    Source,
    finished_values,
    picked_rows,
)

FULL_PRECISION_BYTES = 4
MAX_EXACT_SHIFT = 32  # powers of two beyond this could leave the range of small gradients


class LogitsError(SSDTuneError):
    """Logits were wanted in a way that their deferral cannot serve."""


def chunk_bytes(num_tokens: int, vocab_size: int, *, dtype: torch.dtype, softcapped: bool) -> int:
    """Peak bytes of one chunk's logits and their gradients, for the plan.

    The peak is in the chunk's backward: log-probabilities, their gradient and the logits' gradient,
    all fp32 as the losses of transformers cast; soft-capping keeps one more copy in `dtype`.
    """
    kept = dtype.itemsize if softcapped else 0
    return num_tokens * vocab_size * (3 * FULL_PRECISION_BYTES + kept)


@dataclass(eq=False)
class HeadLoss:
    """How one output head is run. Holds nothing that belongs to a micro-batch.

    head: the outermost module that the model calls as its head. chunk_tokens: rows of logits alive
    at once, over the flattened positions of a micro-batch. ensure_present: called with "F" before
    the head's weights are read in forward and "B" before a recompute in backward; it may wait, and
    other micro-batches may run meanwhile. call: the head's own forward, run with weights present.
    trainable: its parameters that want a gradient. grad_scale: what the training loop multiplies a
    loss by before backward (1 / accumulation steps); only speed depends on it.
    """

    head: nn.Module
    chunk_tokens: int
    ensure_present: Callable[[str], None]
    call: Callable[..., Tensor] = field(default=None)  # type: ignore[assignment]
    trainable: Callable[[], list[nn.Parameter]] = field(default=None)  # type: ignore[assignment]
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise LogitsError(f"the loss's chunk must be 1 token or more, got {self.chunk_tokens}.")
        if self.call is None:
            assert not isinstance(self.head.forward, DeferringForward), "head is already deferred"
            self.call = self.head.forward
        if self.trainable is None:
            self.trainable = lambda: [p for p in self.head.parameters() if p.requires_grad]

    def defer(self, hidden: Tensor, *extra: Any) -> LazyLogits:
        """The logits of `hidden` [..., width], not computed. `extra`: what else the head takes."""
        run = _HeadRun(self, extra, _autocast_now(hidden.device))
        return _Deferral.apply(run, hidden, *self.trainable()).trust()

    def loss_function(self, original: Callable[..., Any]) -> "HintedLoss":
        """`original`, telling the logits it is handed what it will divide their loss by."""
        return HintedLoss(original)


@dataclass(eq=False)
class _HeadRun:
    """One call of the head, without its hidden states: those are autograd's to keep and to free."""

    owner: HeadLoss
    extra: tuple[Any, ...]
    autocast: Callable[[], AbstractContextManager[Any]]
    random: "_RandomState | None" = None

    def describe(self, hidden: Tensor) -> Tensor:
        """The logits of `hidden` as a meta tensor."""
        weight = self.owner.head.weight
        dtype, kind = weight.dtype, hidden.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        assert isinstance(weight, Tensor)
        return torch.empty((*hidden.shape[:-1], weight.shape[0]), dtype=dtype, device="meta")

    def __call__(self, hidden: Tensor) -> Tensor:
        with self.autocast():
            logits = self.owner.call(hidden, *self.extra)
            expected = self.describe(hidden)
        if (logits.shape, logits.dtype) != (expected.shape, expected.dtype):
            raise LogitsError(
                f"the head ({type(self.owner.head).__name__}) gave {logits.dtype} {tuple(logits.shape)}; "
                f"its weight promised {expected.dtype} {tuple(expected.shape)}.\n"
                "Its loss cannot be computed in chunks: report this model, or remove the cast."
            )
        return logits


class _HeadCall(Source):
    """Raw logits of one call of the head."""

    def __init__(self, run: _HeadRun, hidden: Tensor) -> None:
        super().__init__()
        self.run, self.hidden = run, hidden
        self.state = _state_of(run.owner, hidden)
        self.has_chunked_loss = False

    def values(self) -> Tensor:
        self._check_unchanged()
        self.run.owner.ensure_present("F")
        self.run.random = _RandomState.now(self.hidden.device)
        with torch.no_grad(), torch.inference_mode(mode=False):
            return self.run(self.hidden.detach())

    def cross_entropy(self, lazy: LazyLogits, target: Tensor, **options: Any) -> Tensor | None:
        owner, node = self.run.owner, lazy.node
        if self.run.extra or options["reduction"] not in ("mean", "sum", "none"):
            return None
        self._check_unchanged()
        owner.ensure_present("F")
        trainable = owner.trainable()
        loss_autocast = _autocast_now(self.hidden.device)
        chunked = _ChunkedLoss(self.run, node.ops(), options, loss_autocast)
        if not (torch.is_grad_enabled() and lazy.requires_grad):
            with torch.no_grad():
                return chunked.run_all(self.hidden, target, (), None)[0]
        self.has_chunked_loss = True
        expected = chunked.expected_grad(self.hidden, node.divisor)
        return _LossFunction.apply(chunked, expected, target, self.hidden, *trainable)

    def watch_gradient(self) -> None:
        super().watch_gradient()
        if self.has_chunked_loss:
            raise LogitsError(
                "the gradient of outputs.logits is not kept: the loss was computed chunk by chunk.\n"
                "Call the model without labels, call retain_grad() or register_hook() on "
                "outputs.logits, then compute the loss from them."
            )

    def _check_unchanged(self) -> None:
        changed = _what_changed(self.state, _state_of(self.run.owner, self.hidden))
        if changed:
            raise LogitsError(
                f"outputs.logits are computed when first read, and since forward {changed} changed.\n"
                "Read them (outputs.logits.clone() is enough) right after the model's forward."
            )


def _state_of(owner: HeadLoss, hidden: Tensor) -> dict[str, Any]:
    """What the head's values depend on and what a caller may change before reading them."""
    adapters = tuple(
        (getattr(m, "_disable_adapters", None), str(getattr(m, "_active_adapter", None)))
        for m in owner.head.modules()
    )
    versions = {} if hidden.is_inference() else {id(hidden): hidden._version}
    trained = {id(p): p._version for p in owner.trainable() if not p.is_inference()}
    return {"the adapter in use": adapters, "the hidden states": versions, "the head": trained}


def _what_changed(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing that changed. A parameter replaced by another object tells nothing."""
    if before["the adapter in use"] != now["the adapter in use"]:
        return "the adapter in use"
    for what in ("the hidden states", "the head"):
        if any(now[what].get(key, version) != version for key, version in before[what].items()):
            return what
    return None


class _Deferral(torch.autograd.Function):
    """`head(hidden)` as an autograd node whose values come later, or never.

    Backward runs only where somebody computed the values and a gradient came back through them.
    """

    @staticmethod
    def forward(ctx: Any, run: _HeadRun, hidden: Tensor, *trainable: Tensor) -> LazyLogits:
        ctx.run = run
        ctx.save_for_backward(hidden)
        source = _HeadCall(run, hidden)
        return LazyLogits(Node(source, run.describe(hidden), hidden.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        run, (hidden,) = ctx.run, ctx.saved_tensors
        run.owner.ensure_present("B")
        leaf = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
        wanted = _wanted(leaf, run.owner.trainable(), ctx.needs_input_grad[1:])
        with run.random.again() if run.random else nullcontext(), torch.enable_grad():
            logits = run(leaf)
        grads = torch.autograd.grad(logits, wanted, grad_outputs, allow_unused=True)
        return None, *_spread(grads, ctx.needs_input_grad[1:])


@dataclass(frozen=True, eq=False)
class _ChunkedLoss:
    """One cross entropy: all that forward needs, and backward where it must recompute."""

    head: _HeadRun
    ops: tuple[Op, ...]
    options: dict[str, Any]
    autocast: Callable[[], AbstractContextManager[Any]]

    def expected_grad(self, hidden: Tensor, divisor: Tensor | float | None) -> Tensor | None:
        """The gradient that will likely come to the loss, or None: make gradients in backward.

        fp16 makes them in backward, since a loss scaler counts on its factor being in there.
        """
        with self.head.autocast():
            is_half = self.head.describe(hidden).dtype == torch.float16
        if self.options["reduction"] == "none" or is_half:
            return None
        scale = torch.tensor(self.head.owner.grad_scale, device=hidden.device)
        if divisor is None or self.options["reduction"] != "sum":
            return scale
        # The same operator as in the backward of `loss / num_items_in_batch`, for the same bits.
        return scale / (divisor.to(scale.device) if isinstance(divisor, Tensor) else divisor)

    def run_all(
        self, hidden: Tensor, target: Tensor, wanted: "_Wanted", grad_output: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and d_hidden and d_parameters for `grad_output` (nothing where it is None).

        hidden [..., width]; target int64 [num_rows]; wanted: which of (hidden, *parameters).
        """
        num_tokens = hidden.numel() // max(hidden.shape[-1], 1)
        run = self._whole if num_tokens <= self.head.owner.chunk_tokens else self._in_chunks
        return run(hidden, target, wanted, grad_output)

    def _whole(
        self, hidden: Tensor, target: Tensor, wanted: "_Wanted", grad_output: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """One chunk: the operators of the unmodified model, on its shapes."""
        leaf, inputs = _leaf(hidden, wanted)
        with torch.set_grad_enabled(grad_output is not None):
            loss = self._loss_of_all(leaf, target)
        return loss.detach(), _gradients(loss, inputs, wanted, grad_output)

    def _loss_of_all(self, hidden: Tensor, target: Tensor) -> Tensor:
        logits = self.head(hidden)
        with self.autocast():
            for op in self.ops:
                logits = op(logits)
            return F.cross_entropy(logits, target, **self.options)

    def _in_chunks(
        self, hidden: Tensor, target: Tensor, wanted: "_Wanted", grad_output: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        leaf, inputs = _leaf(hidden, wanted)
        with torch.enable_grad():
            rows = picked_rows(leaf, self.ops)
        is_mean, is_none = (self.options["reduction"] == x for x in ("mean", "none"))
        count = (target != self.options["ignore_index"]).sum() if is_mean else None
        losses: list[Tensor] = []
        sums = _Sums(rows, wanted)
        for start in range(0, len(rows), self.head.owner.chunk_tokens):
            part = slice(start, start + self.head.owner.chunk_tokens)
            chunk, chunk_inputs = _leaf(rows.detach()[part], wanted)
            with torch.set_grad_enabled(grad_output is not None):
                loss = self._loss_of_chunk(chunk, target[part], count)
            given = grad_output[part] if is_none and grad_output is not None else grad_output
            sums.add(part, _gradients(loss, [chunk, *inputs[1:]], wanted, given))
            losses.append(loss.detach())
        total = torch.cat(losses) if is_none else _sum_in_order(losses)
        return total, sums.finish(rows, leaf)

    def _loss_of_chunk(self, rows: Tensor, target: Tensor, count: Tensor | None) -> Tensor:
        """rows [num_rows, width] go through the head as one row of a batch."""
        logits = self.head(rows.unsqueeze(0))
        options = self.options if count is None else {**self.options, "reduction": "sum"}
        with self.autocast():
            loss = F.cross_entropy(finished_values(logits, self.ops), target, **options)
            return loss if count is None else loss / count
