"""A cross entropy over logits that exist for one chunk of tokens at a time, with its gradients.

For each chunk of rows

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

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ssdtune.visit.function import random_state, random_state_of
from ssdtune.visit.lazy_logits import Op, finished_values, picked_rows

if TYPE_CHECKING:
    from ssdtune.visit.loss import HeadRun

FULL_PRECISION_BYTES = 4
MAX_EXACT_SHIFT = 32  # powers of two beyond this could leave the range of small gradients


def chunk_bytes(num_tokens: int, vocab_size: int, *, dtype: torch.dtype, softcapped: bool) -> int:
    """Peak bytes of one chunk's logits and their gradients, for the plan.

    The peak is in the chunk's backward: log-probabilities, their gradient and the logits' gradient,
    all fp32 as the losses of transformers cast; soft-capping keeps one more copy in `dtype`.
    """
    kept = dtype.itemsize if softcapped else 0
    return num_tokens * vocab_size * (3 * FULL_PRECISION_BYTES + kept)


@dataclass(frozen=True, eq=False)
class ChunkedLoss:
    """One cross entropy: all that forward needs, and backward where it must recompute."""

    head: HeadRun
    ops: tuple[Op, ...]
    options: dict[str, Any]
    autocast: Callable[[], AbstractContextManager[Any]]

    def expected_grad(self, hidden: Tensor, divisor: Tensor | float | None) -> Tensor | None:
        """The gradient that will likely come to the loss, or None: make gradients in backward.

        fp16 makes them in backward, since a loss scaler counts on its factor being in there.
        """
        with self.head.entered():
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
        leaf = leaf_of(hidden)
        with torch.set_grad_enabled(grad_output is not None):
            loss = self._loss_of_all(leaf, target)
        return loss.detach(), gradients_of(loss, [leaf, *parameters], grad_output)

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
        leaf, chunk_tokens = leaf_of(hidden), self.head.owner.chunk_tokens
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
            chunk = leaf_of(rows[part])
            with torch.set_grad_enabled(grad_output is not None):
                loss = self._loss_of_chunk(chunk, target[part], count)
            given = grad_output if grad_output is None or loss.dim() == 0 else grad_output[part]
            d_chunk, *d_parameters = gradients_of(loss, [chunk, *parameters], given)
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


class LossFunction(torch.autograd.Function):
    """The loss in chunks; its gradients are made in forward wherever they can be."""

    @staticmethod
    def forward(
        ctx: Any,
        chunked: ChunkedLoss,
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


def leaf_of(hidden: Tensor) -> Tensor:
    """The same values where a graph of its own begins."""
    return hidden.detach().requires_grad_(hidden.requires_grad)


def gradients_of(
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


def autocast_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What re-enters the autocast state of this moment, on whatever thread, any number of times.

    Without autocast's cache: it would keep a cast copy of a head that is to leave the device.
    """
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
