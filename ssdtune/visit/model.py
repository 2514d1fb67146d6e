"""A model class whose forward is the front door: everything else is the class's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ssdtune.errors import SSDTuneError
from ssdtune.visit import front_door
from ssdtune.visit.saving import write_weights
from ssdtune.visit.streamer import Streamer


class FrontDoor:
    """Stands for `model.forward`: cuts the batch, runs the micro-batches through `inner`, joins their outputs.

    Inside a run it cuts nothing: a forward set over it (TRL, accelerate) calls it once more for a micro-batch.
    """

    def __init__(self, model: PreTrainedModel, inner: Callable[..., Any]) -> None:
        self.model, self.inner = model, inner
        functools.update_wrapper(self, inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; `micro_batches=[…]` takes separately collated ones."""
        streamer: Streamer = self.model.ssdtune  # type: ignore[assignment]
        if streamer.is_running:
            return self.inner(**self._of_run(streamer, args, kwargs))
        pieces = self._pieces(args, kwargs)
        is_cut = torch.is_grad_enabled() or len(pieces) > 1
        for piece in pieces:
            if is_cut or (piece.get("labels") is not None and "use_cache" not in piece):
                self._without_cache(piece)
        shares = self._share_loss(pieces) if len(pieces) > 1 else None
        streamer.loss_counts_items = False
        outputs = streamer.run([functools.partial(self.inner, **piece) for piece in pieces])
        return front_door.join(
            outputs, _sum_losses(outputs, None if streamer.loss_counts_items else shares)
        )

    def _of_run(
        self, streamer: Streamer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """A call inside a run, as one that a run begins with: a method's own calls, and forwards set over this one."""
        bound = front_door.bind(self.inner, args, kwargs)
        is_for_loss = bound.get("labels") is not None or streamer.has_variants
        if is_for_loss and not bound.keys() & {"use_cache", *front_door.CACHES}:
            self._without_cache(bound)
        return bound

    def _pieces(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        pieces = kwargs.pop(front_door.MICRO_BATCHES, None)
        if pieces is not None:
            return front_door.given(pieces, args, kwargs)
        bound = front_door.bind(self.inner, args, kwargs)
        size: int | None = self.model.ssdtune.micro_batch_size  # type: ignore
        has_cache = any(bound.get(name) is not None for name in front_door.CACHES)
        if torch.is_grad_enabled():
            front_door.refuse_filled_cache(bound)
        if size is None or has_cache:
            return [bound]
        return front_door.cut(bound, size, self.model.config)

    def _without_cache(self, piece: dict[str, Any]) -> None:
        """Key-value caches serve generation; in training they would be written again by recompute, and where a loss
        is asked for they would hold the keys and values of every layer for nobody."""
        if front_door.accepts(self.inner, "use_cache"):
            piece["use_cache"] = False

    def _share_loss(self, pieces: list[dict[str, Any]]) -> list[float] | None:
        """Each micro-batch's share of the batch's loss. Models that take the batch's item count get it as well."""
        counts = [front_door.num_trained(piece, self.model.config) for piece in pieces]
        if any(count is None for count in counts):
            return None
        total = sum(count for count in counts if count is not None)
        if "num_items_in_batch" not in pieces[0] and front_door.accepts_extra(self.inner):
            for piece in pieces:
                piece["num_items_in_batch"] = total
        return [(count or 0) / max(total, 1) for count in counts]


def _sum_losses(outputs: list[Any], shares: list[float] | None) -> torch.Tensor | None:
    """Σ loss, each weighted by its share of the labels where the model took means over micro-batches."""
    losses = [front_door.loss_of(output) for output in outputs]
    if len(losses) == 1 or any(loss is None for loss in losses):
        return None
    if shares is not None and any(shares):
        # The mean over no label is NaN, and so would be its product with a share of 0.
        losses = [
            loss * share
            for loss, share in zip(losses, shares, strict=True)
            if loss is not None and share
        ]
    return sum(losses[1:], losses[0])  # type: ignore[arg-type]


class NotedLoss:
    """A model's loss function that notes whether it was given the batch's item count: then losses add up."""

    def __init__(self, model: PreTrainedModel, original: Callable[..., Any]) -> None:
        self.model, self.original = model, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The original's result."""
        if kwargs.get("num_items_in_batch") is not None:
            self.model.ssdtune.loss_counts_items = True  # type: ignore[union-attr]
        return self.original(*args, **kwargs)


class _ForwardAttribute:
    """`model.forward` of a streamed class: the front door on reading, what is behind it on writing."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain

    def __get__(self, model: PreTrainedModel | None, owner: type) -> Any:
        return self.plain if model is None else model.__dict__["_ssdtune_front_door"]

    def __set__(self, model: PreTrainedModel, value: Callable[..., Any]) -> None:
        model.__dict__["_ssdtune_front_door"] = FrontDoor(model, value)


def stream_class(model: PreTrainedModel) -> None:
    """Turns the model's class into one of the same name whose forward is the front door."""
    plain = type(model)
    namespace: Mapping[str, Any] = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "forward": _ForwardAttribute(plain.forward),
        "gradient_checkpointing_enable": _no_checkpointing,
        "activation_checkpointing_enable": _no_checkpointing,
        "save_pretrained": _save_pretrained,
        "_ddp_params_and_buffers_to_ignore": property(_not_for_ddp),
    }
    inner = plain.forward.__get__(model)
    model.__class__ = type(plain.__name__, (plain,), dict(namespace))
    model.forward = inner  # type: ignore[method-assign]
    model.loss_function = NotedLoss(model, model.loss_function)


def _no_checkpointing(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Nothing to do: every visit recomputes its block already. (Underneath, it would mean a third forward.)"""


def _save_pretrained(
    self: PreTrainedModel, save_directory: str | Path, is_main_process: bool = True, **more: Any
) -> None:
    """The weights as they are now, where a method has moved them, to a new folder. Otherwise they are the user's own
    files, and an adapter saves itself. Of several processes the first one writes, as in transformers."""
    streamer: Streamer = self.ssdtune  # type: ignore[assignment]
    if streamer.method is None or not streamer.method.trains_blocks:
        raise SSDTuneError(
            f"the base weights of a streamed model are not saved: they are, unchanged, the files in "
            f"{self.config._name_or_path}.\nSave the adapter instead: peft_model.save_pretrained(folder)."
        )
    if more:
        raise SSDTuneError(
            f"save_pretrained({', '.join(more)}): a streamed model is written a block to a file, as it is, and no "
            "otherwise.\nGive the folder alone."
        )
    if is_main_process and not (dist.is_initialized() and dist.get_rank()):
        write_weights(self, Path(save_directory))


def _not_for_ddp(self: PreTrainedModel) -> list[str]:
    """Names of streamed weights, with and without peft's prefix: DistributedDataParallel must not broadcast them."""
    streamer: Streamer = self.ssdtune  # type: ignore[assignment]
    streamed = {id(w.placeholder) for w in streamer.weights if not w.is_resident}
    names = [n for n, p in self.named_parameters(remove_duplicate=False) if id(p) in streamed]
    return [prefix + name for name in names for prefix in ("", "base_model.model.")]
