"""Sizes for the prediction of a run's peak memory, and the means to hold a process to it.

The architecture's own sizes come from a *rehearsal*: the model's own forward for one micro-batch, then backward of one
block of each kind, on tensors that have shapes but no memory, while every allocation is counted. It takes about a
second, reads no weights, and knows masks, experts and adapters as they are. A model that cannot be rehearsed (its
forward looks at values) is estimated by a formula for decoder layers, and said to be.

What torch frees does not all go back to the kernel: the C library's heap keeps holes. With the default settings of
glibc 2.36 they came to 25 % of the whole process (width 512, 4 x 512 tokens), growing over the first steps. A low
M_MMAP_THRESHOLD (`mallopt`) leaves none, but pages every activation in anew: 35 % more CPU time there. So `HeapKeeper`
gives holes back, by `malloc_trim`, only when the process holds more than was predicted: 2-6 % more CPU time where that
is so all the time, none where there is room. This is the one place where ssdtune touches the allocator.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from ssdtune.schedule.memory import HOLES, Fixed, Footprint, Peak, predict_peak
from ssdtune.swap.inputs import staging_bytes
from ssdtune.visit.function import random_state, random_state_of
from ssdtune.visit.loss import chunk_bytes
from ssdtune.visit.streamer import Meeting, Streamer

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def predict(
    model: Any,
    micro_batch: Mapping[str, Any],
    *,
    num_micro_batches: int,
    base_bytes: int,
    num_states: int = 2,
) -> Peak:
    """The peak of training `model` on steps of so many micro-batches like `micro_batch`.

    Args:
        model: a streamed model, adapters and all.
        micro_batch: what its forward is called with, of the longest shape that will come. Values do not matter,
            but for a mask: one that masks nothing is left out, as the model would.
        num_micro_batches: of one optimizer step.
        base_bytes: what the process held before the model was opened (`resident_set_bytes`).
        num_states: the optimizer's states per parameter, in its dtype; 2 for Adam.
    """
    streamer: Streamer = _base(model).ssdtune
    footprint = footprint_of(model, micro_batch)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    fixed = Fixed(
        base_bytes=base_bytes,
        resident_bytes=_resident_bytes(model, streamer),
        trained_bytes=trained,
        gradient_bytes=trained,
        optimizer_bytes=num_states * trained,
        staging_bytes=staging_bytes(streamer.engine.plan.block_inputs),
    )
    return predict_peak(streamer.engine.plan, footprint, fixed, num_micro_batches=num_micro_batches)


def resident_set_bytes() -> int:
    """Bytes of RAM that this process holds now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE_BYTES


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _resident_bytes(model: nn.Module, streamer: Streamer) -> int:
    """Frozen parameters and buffers that are no placeholders."""
    streamed = {id(w.placeholder) for w in streamer.weights}
    tensors = itertools.chain(model.parameters(), model.buffers())
    return sum(t.nbytes for t in tensors if id(t) not in streamed and not t.requires_grad)


# ---- rehearsal -----------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators made under it and that are still alive.

    Views of what was there before (`weight.t()`) are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it made."""
        kwargs = kwargs or {}
        pytree.tree_map_only(torch.Tensor, lambda x: self._meet(x, is_made=False), (args, kwargs))
        out = func(*args, **kwargs)
        pytree.tree_map_only(torch.Tensor, lambda x: self._meet(x, is_made=True), out)
        return out

    def _meet(self, tensor: torch.Tensor, *, is_made: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or tensor.is_meta:
            return
        num_bytes = storage.nbytes() if is_made else 0
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, num_bytes)

    def _gone(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def footprint_of(model: Any, micro_batch: Mapping[str, Any]) -> Footprint:
    """What one micro-batch takes: rehearsed where the model allows, else by formula."""
    base = _base(model)
    streamer: Streamer = base.ssdtune
    shape = _rows_and_length(micro_batch)
    with _quiet("torch._subclasses.fake_tensor"), random_state_of(random_state()):
        try:
            return _rehearse(base, streamer, micro_batch)
        except Exception as error:  # whatever a model does with values that are not there
            return _by_formula(base, streamer, shape, type(error).__name__)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No messages of this logger for a `with` block: the failure is handled."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _rehearse(base: Any, streamer: Streamer, micro_batch: Mapping[str, Any]) -> Footprint:
    rehearsal = _Rehearsal(streamer)
    inputs = {k: v for k, v in micro_batch.items() if k != "labels" and not _masks_nothing(k, v)}
    inner = base.__dict__["_ssdtune_front_door"].inner
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs)
        with rehearsal.on_stage(base), _unpacked(), rehearsal.live, torch.enable_grad():
            output = inner(**fakes)
            held = rehearsal.live.now
            del output
    kept = sum(rehearsal.kept.values())
    return Footprint(
        kept_bytes=kept,
        hidden_bytes=max(rehearsal.hidden, default=0),
        held_bytes=max(held - kept, 0),
        workspace_bytes=max(rehearsal.workspaces.values(), default=0),
        loss_bytes=_loss_bytes(base, streamer, _rows_and_length(micro_batch)),
        how="rehearsed on tensors without memory",
    )


class _Rehearsal:
    """Stands for every block's forward: runs it without a graph, holds its inputs as a visit does, counts."""

    def __init__(self, streamer: Streamer) -> None:
        self.streamer = streamer
        self.live = LiveBytes()
        self.kept: dict[int, int] = {}  # storage -> bytes of an input kept for backward
        self.hidden: list[int] = []
        self.workspaces: dict[Any, int] = {}  # kind of block -> bytes
        self._alive: list[torch.Tensor] = []

    @contextlib.contextmanager
    def on_stage(self, base: nn.Module) -> Iterator[None]:
        """Blocks are ours and all parameters without memory, for a `with` block."""
        before: list[tuple[nn.Module, dict[str, Any]]] = []
        forwards: list[tuple[nn.Module, Any]] = []
        try:
            for module in base.modules():
                before.append((module, dict(module._parameters)))
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = _without_memory(parameter)
            for meeting in self.streamer.meetings:
                if meeting.module.__dict__.get("forward") is meeting:
                    forwards.append((meeting.module, meeting))
                    meeting.module.forward = _Stage(self, meeting)  # type: ignore[method-assign]
            yield
        finally:
            for module, meeting in forwards:
                module.forward = meeting
            for module, parameters in before:
                module._parameters.update(parameters)
            self._alive.clear()

    def play(self, meeting: Meeting, args: Any, kwargs: Any) -> Any:
        """One block's forward."""
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        kind = (type(meeting.module), *(tuple(p.shape) for p in meeting.module.parameters()))
        if kind not in self.workspaces:
            self.workspaces[kind] = self._workspace(meeting, args, kwargs)
        for i, x in enumerate(tensors):
            self._alive.append(x)
            if x.is_floating_point() and (i == 0 or x.requires_grad):
                self.kept[x.untyped_storage()._cdata] = x.nbytes
                self.hidden.append(x.nbytes)
        with torch.no_grad():
            out = meeting.inner(*args, **kwargs)
        return pytree.tree_map_only(
            torch.Tensor, lambda x: x.requires_grad_() if x.is_floating_point() else x, out
        )

    def _workspace(self, meeting: Meeting, args: Any, kwargs: Any) -> int:
        """Bytes beyond the inputs that recompute and backward hold at once."""
        before = self.live.peak = self.live.now
        leaves: list[torch.Tensor] = []

        def leaf(x: torch.Tensor) -> torch.Tensor:
            made = x.detach()
            if made.is_floating_point():
                leaves.append(made.requires_grad_())
            return made

        args, kwargs = pytree.tree_map_only(torch.Tensor, leaf, (args, kwargs))
        outs = [
            x
            for x in pytree.tree_leaves(meeting.inner(*args, **kwargs))
            if isinstance(x, torch.Tensor) and x.requires_grad
        ]
        trained = [p for p in meeting.module.parameters() if p.requires_grad]
        inputs = [*leaves[:1], *trained]
        if outs and inputs:
            grads = [torch.empty_like(x) for x in outs]
            torch.autograd.grad(outs, inputs, grads, allow_unused=True)
        return self.live.peak - before


class _Stage:
    """A block's forward in a rehearsal."""

    def __init__(self, rehearsal: _Rehearsal, meeting: Meeting) -> None:
        self.rehearsal, self.meeting = rehearsal, meeting

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `_Rehearsal.play`."""
        return self.rehearsal.play(self.meeting, args, kwargs)


@contextlib.contextmanager
def _unpacked() -> Iterator[None]:
    """transformers looks at the positions' values for packed rows and, where it can't, builds a full mask. Batches
    cut at the front door have no packed rows."""
    finder = getattr(masking_utils, "find_packed_sequence_indices", None)
    try:
        if finder is not None:
            masking_utils.find_packed_sequence_indices = lambda position_ids: None
        yield
    finally:
        if finder is not None:
            masking_utils.find_packed_sequence_indices = finder


def _without_memory(parameter: torch.Tensor) -> nn.Parameter:
    made = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device
    )
    return nn.Parameter(made, requires_grad=parameter.requires_grad)


def _masks_nothing(name: str, value: Any) -> bool:
    return name == "attention_mask" and isinstance(value, torch.Tensor) and bool((value == 1).all())


def _rows_and_length(micro_batch: Mapping[str, Any]) -> tuple[int, int]:
    ids = micro_batch.get("input_ids", micro_batch.get("inputs_embeds"))
    if not isinstance(ids, torch.Tensor):
        return 1, 1
    return ids.shape[0], ids.shape[1]


def _loss_bytes(base: Any, streamer: Streamer, shape: tuple[int, int]) -> int:
    """Logits and gradients of one chunk, or of the micro-batch where that is less."""
    config = base.config.get_text_config()
    tokens = min(shape[0] * shape[1], streamer.engine.plan.chunk_tokens)
    is_capped = getattr(config, "final_logit_softcapping", None) is not None
    return chunk_bytes(tokens, config.vocab_size, dtype=base.dtype, softcapped=is_capped)


def _by_formula(base: Any, streamer: Streamer, shape: tuple[int, int], why: str) -> Footprint:
    """For decoder layers: what norms, attention and a gated MLP keep for backward, per token.

    16 values of the model's width (two norms with fp32 copies, q, k, v, rotated and plain, attention's result,
    residuals, gradients) and 8 of the MLP's (gate, up, their product, activation and gradients).
    """
    config = base.config.get_text_config()
    tokens, size = shape[0] * shape[1], base.dtype.itemsize
    width = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    hidden = tokens * width * size
    return Footprint(
        kept_bytes=hidden * max(len(streamer.blocks) - 1, 1),
        hidden_bytes=hidden,
        held_bytes=3 * tokens * width * 4,
        workspace_bytes=tokens * (16 * width + 8 * inner) * size,
        loss_bytes=_loss_bytes(base, streamer, shape),
        how=f"by formula, since the model can't be rehearsed: {why}",
    )


# ---- holding the process to it -------------------------------------------------------------------------------------


class HeapKeeper:
    """Gives holes in the C library's heap back to the kernel when the process holds more than `limit_bytes`.

    Called before each micro-batch's pass through a block. Costs one read of /proc/self/statm, and where the limit is
    passed one `malloc_trim`, after which the next pass pages its workspace in anew.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        held: Callable[[], int] = resident_set_bytes,
        trim: Callable[[], None] | None = None,
    ) -> None:
        self.limit_bytes, self.num_trims = limit_bytes, 0
        self._held, self._trim = held, trim or _trimmer()

    def __call__(self) -> None:
        """Trims if need be."""
        if self._trim is not None and self._held() > self.limit_bytes:
            self._trim()
            self.num_trims += 1


def hold_to(model: Any, peak: Peak) -> HeapKeeper:
    """From now on the streamed model's passes keep the heap to the predicted peak; for runs whose RAM is short."""
    keeper = HeapKeeper(peak.ram_bytes - peak.ram.get(HOLES, 0) // 2)
    _base(model).ssdtune.before_pass = keeper
    return keeper


def _trimmer() -> Callable[[], None] | None:
    """glibc's `malloc_trim(0)`; None under another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(0)


__all__: Sequence[str] = (
    "HeapKeeper",
    "LiveBytes",
    "footprint_of",
    "hold_to",
    "predict",
    "resident_set_bytes",
)
