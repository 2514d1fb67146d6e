"""A model's output head: found, made to defer its logits (`loss.py`), and given back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ssdtune.visit.base import base_of
from ssdtune.visit.lazy_logits import LazyLogits
from ssdtune.visit.loss import DeferringForward, HeadLoss


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


def find_head(model: Any) -> nn.Module | None:
    """The outermost module that `model` calls for its logits, adapters on it included.

    None: there is none, or it is not one matrix, so logits stay ordinary tensors.
    """
    head = base_of(model).get_output_embeddings()
    return head if isinstance(getattr(head, "weight", None), Tensor) else None


def install(model: Any, owner: HeadLoss) -> None:
    """Make `owner.head` defer its logits and the model's loss function hint at its divisor."""
    base, head = base_of(model), owner.head
    assert not isinstance(head.forward, DeferringForward), "install the head's loss once"
    head.forward = DeferringForward(owner)  # type: ignore[method-assign]
    if hasattr(base, "loss_function") and not isinstance(base.loss_function, HintedLoss):
        base.loss_function = HintedLoss(base.loss_function)


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
