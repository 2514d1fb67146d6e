"""The head and its loss as one block: logits exist for one chunk of tokens at a time.

The head's `forward` is replaced by one that returns `LazyLogits` (see `lazy_logits.py`), and every
`cross_entropy` over them comes here, whatever loss function called it: the model's own
(`ForCausalLMLoss` shifts, pads, counts and divides as its authors wrote it), a seq2seq model's, or
a user's. `chunked_loss.py` computes it; where somebody reads logits all the same, they are computed
here, whole. `head.py` puts all this into a model.
"""

from __future__ import annotations

import contextvars
import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssdtune.errors import SSDTuneError
from ssdtune.visit.chunked_loss import (
    ChunkedLoss,
    LossFunction,
    autocast_now,
    gradients_of,
    leaf_of,
)
from ssdtune.visit.function import random_state, random_state_of
from ssdtune.visit.lazy_logits import LazyLogits, Node, Source
from ssdtune.visit.thread_state import ThreadState


class LogitsError(SSDTuneError):
    """Logits were wanted in a way that their deferral cannot serve."""


@dataclass(eq=False)
class HeadLoss:
    """How one output head is run. Holds nothing that belongs to a micro-batch.

    head: the outermost module that the model calls as its head. chunk_tokens: rows of logits alive
    at once, over the flattened positions of a micro-batch. ensure_present: called with "F" before
    the head's weights are read in forward and "B" before a recompute in backward; it may wait, and
    other micro-batches may run meanwhile. grad_scale: what the training loop multiplies a loss by
    before backward (1 / accumulation steps, say); only speed depends on it. call: the head's own
    forward, its present one by default; it must not wait for other micro-batches.
    """

    head: nn.Module
    chunk_tokens: int
    ensure_present: Callable[[str], None]
    grad_scale: float = 1.0
    call: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise LogitsError(f"the loss's chunk must be 1 token or more, got {self.chunk_tokens}.")
        self.plain = self.call or self.head.forward
        assert not isinstance(self.plain, DeferringForward), "this head is deferred already"

    def trainable(self) -> list[nn.Parameter]:
        """The head's parameters that train."""
        return [p for p in self.head.parameters() if p.requires_grad]

    def defer(self, hidden: Tensor, *extra: Any, **named: Any) -> LazyLogits:
        """The logits of `hidden` [..., width], not computed; the rest is what else the head takes.

        Raises LogitsError for a further input that wants a gradient: it would get none.
        """
        if any(getattr(x, "requires_grad", False) for x in (*extra, *named.values())):
            raise LogitsError(
                f"the head ({type(self.head).__name__}) takes a second input that needs a gradient; "
                "streaming such a head is not supported."
            )
        run = HeadRun(self, extra, named)
        return _Deferral.apply(run, hidden, *self.trainable()).trust()


@dataclass(eq=False)
class HeadRun:
    """One call of the head, without its hidden states: those are autograd's to keep and to free."""

    owner: HeadLoss
    extra: tuple[Any, ...]
    named: dict[str, Any]
    random: Any = None  # the generators' state when values were computed
    # Of the call: values and gradients may be computed when the caller has left it, or in another thread.
    state: ThreadState = field(default_factory=ThreadState.capture)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def entered(self) -> AbstractContextManager[None]:
        """Autocast and modes of the call; gradients, inference mode and stream are of whoever computes.

        Without autocast's cache: it would keep a cast copy of a head that is to leave the device."""
        now = ThreadState.capture()
        return dataclasses.replace(
            self.state,
            grad=now.grad,
            inference=now.inference,
            stream=now.stream,
            autocast_cache=False,
        ).entered()

    def describe(self, hidden: Tensor) -> Tensor:
        """The logits of `hidden` as a meta tensor."""
        weight = self.owner.head.weight
        assert isinstance(weight, Tensor)
        dtype, kind = weight.dtype, hidden.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return torch.empty((*hidden.shape[:-1], weight.shape[0]), dtype=dtype, device="meta")

    def __call__(self, hidden: Tensor) -> Tensor:
        with self.entered():
            context = self.context.copy()  # one is entered once at a time
            logits = context.run(self.owner.plain, hidden, *self.extra, **self.named)
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

    def __init__(self, run: HeadRun, hidden: Tensor) -> None:
        super().__init__()
        self.run, self.hidden = run, hidden
        self.state = _state_of(run.owner, hidden)
        self.has_chunked_loss = False

    def values(self) -> Tensor:
        self._check_unchanged()
        self.run.owner.ensure_present("F")
        self.run.random = random_state()
        with torch.no_grad(), torch.inference_mode(mode=self.hidden.is_inference()):
            return self.run(self.hidden.detach())

    def cross_entropy(self, lazy: LazyLogits, target: Tensor, **options: Any) -> Tensor | None:
        owner, node = self.run.owner, lazy.node
        if self.run.extra or self.run.named or options["reduction"] not in ("mean", "sum", "none"):
            return None
        self._check_unchanged()
        owner.ensure_present("F")
        chunked = ChunkedLoss(self.run, node.ops(), options, autocast_now(self.hidden.device))
        if not (torch.is_grad_enabled() and lazy.requires_grad):
            with torch.no_grad():
                return chunked.run(self.hidden, target, (), None)[0]
        self.has_chunked_loss = True
        expected = chunked.expected_grad(self.hidden, node.divisor)
        return LossFunction.apply(chunked, expected, target, self.hidden, *owner.trainable())

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
                "Call outputs.logits.compute() right after the model's forward."
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
    def forward(ctx: Any, run: HeadRun, hidden: Tensor, *parameters: Tensor) -> LazyLogits:
        ctx.run = run
        ctx.save_for_backward(hidden)
        return LazyLogits(Node(_HeadCall(run, hidden), run.describe(hidden), hidden.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore
        run, (hidden,) = ctx.run, ctx.saved_tensors
        run.owner.ensure_present("B")
        leaf = leaf_of(hidden)
        with random_state_of(run.random or random_state()), torch.enable_grad():
            logits = run(leaf)
        return None, *gradients_of(logits, [leaf, *run.owner.trainable()], grad_outputs[0])


class DeferringForward:
    """In place of the head's `forward`. A deep copy of the head gets the plain one back:
    peft copies modules that it is to train, and a copy that deferred to the old weights would
    train nothing."""

    def __init__(self, owner: HeadLoss) -> None:
        self.owner = owner
        self.replaced = owner.head.__dict__.get("forward")

    def __call__(self, *args: Any, **named: Any) -> LazyLogits:
        if not args:
            (hidden,), named = named.values(), {}
            return self.owner.defer(hidden)
        return self.owner.defer(*args, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Tensor]:
        return copy.deepcopy(self.owner.plain, memo)  # a bound method: bound to the head's copy
