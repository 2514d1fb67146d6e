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

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ssdtune.errors import SSDTuneError
from ssdtune.visit.function import random_state, random_state_of
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
        run = _HeadRun(self, extra, named, _autocast_now(hidden.device))
        return _Deferral.apply(run, hidden, *self.trainable()).trust()

    def loss_function(self, original: Callable[..., Any]) -> HintedLoss:
        """`original`, telling the logits it is handed what it will divide their loss by."""
        return HintedLoss(original)


@dataclass(eq=False)
class _HeadRun:
    """One call of the head, without its hidden states: those are autograd's to keep and to free."""

    owner: HeadLoss
    extra: tuple[Any, ...]
    named: dict[str, Any]
    autocast: Callable[[], AbstractContextManager[Any]]
    random: Any = None  # the generators' state when values were computed

    def describe(self, hidden: Tensor) -> Tensor:
        """The logits of `hidden` as a meta tensor."""
        weight = self.owner.head.weight
        assert isinstance(weight, Tensor)
        dtype, kind = weight.dtype, hidden.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return torch.empty((*hidden.shape[:-1], weight.shape[0]), dtype=dtype, device="meta")

    def __call__(self, hidden: Tensor) -> Tensor:
        with self.autocast():
            logits = self.owner.plain(hidden, *self.extra, **self.named)
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
        self.run.random = random_state()
        with torch.no_grad(), torch.inference_mode(mode=self.hidden.is_inference()):
            return self.run(self.hidden.detach())

    def cross_entropy(self, lazy: LazyLogits, target: Tensor, **options: Any) -> Tensor | None:
        owner, node = self.run.owner, lazy.node
        if self.run.extra or self.run.named or options["reduction"] not in ("mean", "sum", "none"):
            return None
        self._check_unchanged()
        owner.ensure_present("F")
        chunked = _ChunkedLoss(self.run, node.ops(), options, _autocast_now(self.hidden.device))
        if not (torch.is_grad_enabled() and lazy.requires_grad):
            with torch.no_grad():
                return chunked.run(self.hidden, target, (), None)[0]
        self.has_chunked_loss = True
        expected = chunked.expected_grad(self.hidden, node.divisor)
        return _LossFunction.apply(chunked, expected, target, self.hidden, *owner.trainable())

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
    def forward(ctx: Any, run: _HeadRun, hidden: Tensor, *parameters: Tensor) -> LazyLogits:
        ctx.run = run
        ctx.save_for_backward(hidden)
        return LazyLogits(Node(_HeadCall(run, hidden), run.describe(hidden), hidden.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore
        run, (hidden,) = ctx.run, ctx.saved_tensors
        run.owner.ensure_present("B")
        leaf = _leaf(hidden)
        with random_state_of(run.random or random_state()), torch.enable_grad():
            logits = run(leaf)
        return None, *_gradients(logits, [leaf, *run.owner.trainable()], grad_outputs[0])


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
        if self.options["reduction"] != "sum" or divisor is None:
            return scale
        # The same operator as in the backward of `loss / num_items_in_batch`, for the same bits.
        if isinstance(divisor, Tensor):
            divisor = divisor.to(scale.device)
        scale = scale / divisor
        return scale.reshape(()) if scale.numel() == 1 else None

    def run(
        self,
        hidden: Tensor,
        target: Tensor,
        parameters: Sequence[Tensor],
        grad_output: Tensor | None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and the gradients of (hidden, *parameters) for `grad_output`.

        hidden [..., width]; target int64 [num_rows]. Without `grad_output` there are no gradients.
        """
        num_tokens = hidden.numel() // max(hidden.shape[-1], 1)
        fits = num_tokens <= self.head.owner.chunk_tokens
        return (self._whole if fits else self._in_chunks)(hidden, target, parameters, grad_output)

    def _whole(
        self,
        hidden: Tensor,
        target: Tensor,
        parameters: Sequence[Tensor],
        grad_output: Tensor | None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """One chunk: the operators of the unmodified model, on its shapes."""
        leaf = _leaf(hidden)
        with torch.set_grad_enabled(grad_output is not None):
            loss = self._loss_of_all(leaf, target)
        return loss.detach(), _gradients(loss, [leaf, *parameters], grad_output)

    def _loss_of_all(self, hidden: Tensor, target: Tensor) -> Tensor:
        logits = self.head(hidden)
        with self.autocast():
            for op in self.ops:
                logits = op(logits)
            return F.cross_entropy(logits, target, **self.options)

    def _in_chunks(
        self,
        hidden: Tensor,
        target: Tensor,
        parameters: Sequence[Tensor],
        grad_output: Tensor | None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        leaf, chunk_tokens = _leaf(hidden), self.head.owner.chunk_tokens
        with torch.enable_grad():
            rows = picked_rows(leaf, self.ops)
        count = None
        if self.options["reduction"] == "mean":
            count = (target != self.options["ignore_index"]).sum()
        losses: list[Tensor] = []
        d_rows: list[Tensor | None] = []
        sums: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, max(len(rows), 1), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            chunk = _leaf(rows[part])
            with torch.set_grad_enabled(grad_output is not None):
                loss = self._loss_of_chunk(chunk, target[part], count)
            given = grad_output if grad_output is None or loss.dim() == 0 else grad_output[part]
            d_chunk, *d_parameters = _gradients(loss, [chunk, *parameters], given)
            losses.append(loss.detach())
            d_rows.append(d_chunk)
            sums = [_plus(*pair) for pair in zip(sums, d_parameters, strict=True)]
        return _joined_losses(losses), [_back_to_hidden(d_rows, rows, leaf), *sums]

    def _loss_of_chunk(self, rows: Tensor, target: Tensor, count: Tensor | None) -> Tensor:
        """rows [num_rows, width] go through the head as one row of a batch."""
        logits = self.head(rows.unsqueeze(0))
        options = self.options if count is None else {**self.options, "reduction": "sum"}
        with self.autocast():
            loss = F.cross_entropy(finished_values(logits, self.ops), target, **options)
            return loss if count is None else loss / count


class _LossFunction(torch.autograd.Function):
    """The loss in chunks; its gradients are made in forward wherever they can be."""

    @staticmethod
    def forward(
        ctx: Any,
        chunked: _ChunkedLoss,
        expected: Tensor | None,
        target: Tensor,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.chunked, ctx.random = chunked, random_state()
        loss, gradients = chunked.run(hidden, target, parameters, expected)
        # Through autograd, not as attributes: backward frees them even while the loss is alive.
        ctx.save_for_backward(hidden, target, expected, *gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore
        hidden, target, expected, *gradients = ctx.saved_tensors
        factor = _exact_factor(grad_outputs[0], expected)
        if factor is None:
            owner = ctx.chunked.head.owner
            owner.ensure_present("B")
            with random_state_of(ctx.random):
                _, gradients = ctx.chunked.run(hidden, target, owner.trainable(), grad_outputs[0])
        elif factor != 1.0:
            gradients = [g if g is None else g * factor for g in gradients]
        return None, None, None, *gradients


def _leaf(hidden: Tensor) -> Tensor:
    return hidden.detach().requires_grad_(hidden.requires_grad)


def _gradients(
    output: Tensor, inputs: Sequence[Tensor], grad_output: Tensor | None
) -> list[Tensor | None]:
    """One gradient for each of `inputs`, None for those that want none or have none."""
    wanted = [x for x in inputs if x.requires_grad]
    if grad_output is None or not output.requires_grad:
        return [None] * len(inputs)
    given = grad_output.to(output.dtype)
    found = iter(torch.autograd.grad(output, wanted, given, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more  # not in place: autograd may have handed out one tensor twice


def _back_to_hidden(d_rows: list[Tensor | None], rows: Tensor, hidden: Tensor) -> Tensor | None:
    """The gradient of all hidden states from that of the rows picked from them."""
    found = [d for d in d_rows if d is not None]
    if not found:
        return None
    return torch.autograd.grad(rows, hidden, torch.cat(found))[0]


def _joined_losses(losses: list[Tensor]) -> Tensor:
    """Per-row losses in a row; sums added in order, in fp32."""
    if losses[0].dim():
        return torch.cat(losses)
    total = losses[0].float()
    for loss in losses[1:]:
        total = total + loss.float()
    return total.to(losses[0].dtype)


def _exact_factor(grad_output: Tensor, expected: Tensor | None) -> float | None:
    """grad_output / expected where scaling by it loses no bit (a power of two), else None.

    Reads two numbers from the device: it waits for what is queued there, once per micro-batch.
    """
    if expected is None:
        return None
    came, foreseen = torch.stack([grad_output.double(), expected.double()]).tolist()
    if came == foreseen:
        return 1.0
    if foreseen == 0.0 or not (math.isfinite(came) and math.isfinite(foreseen)):
        return None
    mantissa, exponent = math.frexp(came / foreseen)
    is_exact = abs(mantissa) == 0.5 and abs(exponent) <= MAX_EXACT_SHIFT
    return came / foreseen if is_exact and came / foreseen * foreseen == came else None


def _autocast_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What re-enters the autocast state of this moment, on whatever thread, any number of times.

    Without autocast's cache: it would keep a cast copy of a head that is to leave the device.
    """
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


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


class HintedLoss:
    """A model's loss function that also tells deferred logits what their loss is divided by."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, *args: Any, **named: Any) -> Any:
        for logits in (*args, *named.values()):
            if isinstance(logits, LazyLogits):
                logits.node.divisor = named.get("num_items_in_batch")
        return self.original(*args, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self.original, memo)


def _language_model(model: Any) -> Any:
    """The model whose `forward` calls head and loss, under peft's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_head(model: Any) -> nn.Module | None:
    """The outermost module that `model` calls for its logits, adapters on it included.

    None: there is none, or it is not one matrix, so logits stay ordinary tensors.
    """
    head = _language_model(model).get_output_embeddings()
    return head if isinstance(getattr(head, "weight", None), Tensor) else None


def install(model: Any, owner: HeadLoss) -> None:
    """Make `owner.head` defer its logits and the model's loss function hint at its divisor."""
    base, head = _language_model(model), owner.head
    assert not isinstance(head.forward, DeferringForward), "install the head's loss once"
    head.forward = DeferringForward(owner)  # type: ignore[method-assign]
    if hasattr(base, "loss_function") and not isinstance(base.loss_function, HintedLoss):
        base.loss_function = owner.loss_function(base.loss_function)


def uninstall(model: Any, owner: HeadLoss) -> None:
    """Give head and model back what `install` replaced."""
    base = _language_model(model)
    _restore_forward(owner)
    if isinstance(getattr(base, "_loss_function", None), HintedLoss):
        original = base._loss_function.original
        del base._loss_function
        if base.loss_function is not original:
            base.loss_function = original


def _restore_forward(owner: HeadLoss) -> None:
    forward = owner.head.forward
    if isinstance(forward, DeferringForward):
        del owner.head.forward
        if forward.replaced is not None:
            owner.head.forward = forward.replaced  # type: ignore[method-assign]


def refresh(model: Any, owner: HeadLoss) -> HeadLoss:
    """Follow the head after the model was changed: peft puts adapters around it.

    Returns `owner` where nothing changed, else one installed on the head that is there now. Left
    alone, an adapted head is still right, but its logits are computed whole.
    """
    head = find_head(model)
    if head is None or head is owner.head:
        return owner
    _restore_forward(owner)
    moved = HeadLoss(head, owner.chunk_tokens, owner.ensure_present, grad_scale=owner.grad_scale)
    head.forward = DeferringForward(moved)  # type: ignore[method-assign]
    return moved
