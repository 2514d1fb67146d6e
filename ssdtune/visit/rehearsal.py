"""A rehearsal: one micro-batch through a streamed model on tensors that have shapes but no memory.

The model's own forward, then backward of one block of each kind, while every operator is looked at: what it allocates
gives the architecture's part of the peak (`Footprint`), what it computes gives the time of a visit (`Work`). It takes
about a second, reads no weights, and knows masks, experts and adapters as they are. A model that cannot be rehearsed
(its forward looks at values) gets a footprint by a formula for decoder layers, said to be, and no work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from ssdtune.schedule.cost import Operator, StepWork, Work
from ssdtune.schedule.memory import Footprint
from ssdtune.schedule.plan import Direction
from ssdtune.visit.activations import saving
from ssdtune.visit.counting import WorkCounter
from ssdtune.visit.draft import Draft, Options
from ssdtune.visit.front_door import accepts
from ssdtune.visit.function import random_state, random_state_of
from ssdtune.visit.loss import chunk_bytes
from ssdtune.visit.streamer import Streamer

CHECKS_OFF = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # see transformers.utils.torch_compilable_check
ADAMW_OPERATORS = (
    16  # pointwise ones of a parameter and step, clipping included, each over three tensors
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What one micro-batch takes. `work`: None where the model could not be rehearsed."""

    footprint: Footprint
    work: StepWork | None


@dataclasses.dataclass(frozen=True)
class _Point:
    """A meeting point: its module, its block's number, the forward that computes."""

    module: nn.Module
    block: int
    inner: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _Cast:
    """What is rehearsed. front: the model's forward for one micro-batch. head: the point whose logits are never made
    whole, if any. device: where the weights would be."""

    base: Any
    front: Callable[..., Any]
    points: list[_Point]
    head: _Point | None
    chunk_tokens: int
    device: torch.device


def rehearse(model: Any, micro_batch: Mapping[str, Any]) -> Rehearsed:
    """Rehearses a streamed model, adapters and all, on one micro-batch; the model and the generators stay as they are."""
    base = base_of(model)
    streamer: Streamer = base.ssdtune
    points = [
        _Point(m.module, m.block, m.inner)
        for m in streamer.meetings
        if m.module.__dict__.get("forward") is m
    ]
    last = streamer.meetings[-1]
    is_deferred = len(points) < len(streamer.meetings)
    return _rehearsed(
        _Cast(
            base=base,
            front=base.__dict__["_ssdtune_front_door"].inner,
            points=points,
            head=_Point(last.module, last.block, last.inner) if is_deferred else None,
            chunk_tokens=streamer.engine.plan.chunk_tokens,
            device=streamer.engine.slots.device,
        ),
        micro_batch,
    )


def rehearse_draft(
    model: Any, drafted: Draft, options: Options, micro_batch: Mapping[str, Any]
) -> Rehearsed:
    """The same for a model that was built without weights, adapters and all, and drafted before they were put on."""
    base = base_of(model)
    block_of = {p.module: i for i, group in enumerate(drafted.groups) for p in group.points}
    points = [_Point(p.module, block_of[p.module], p.module.forward) for p in drafted.points]
    head = points.pop() if drafted.is_deferred else None
    return _rehearsed(
        _Cast(
            base=base,
            front=base.forward,
            points=points,
            head=head,
            chunk_tokens=options.chunk_tokens,
            device=options.device,
        ),
        micro_batch,
    )


def _rehearsed(cast: _Cast, micro_batch: Mapping[str, Any]) -> Rehearsed:
    with _quiet("torch._subclasses.fake_tensor"), random_state_of(random_state()):
        try:
            return _rehearse(cast, micro_batch)
        except Exception as error:  # whatever a model does with values that are not there
            footprint = _by_formula(cast, _rows_and_length(micro_batch), type(error).__name__)
            return Rehearsed(footprint=footprint, work=None)


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators made under it and that are still alive.

    Views of what was there before (`weight.t()`) are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._counts = True

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is made in a `with` block counts as having been there."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

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
        num_bytes = storage.nbytes() if is_made and self._counts else 0
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, num_bytes)

    def _gone(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


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


def _rehearse(cast: _Cast, micro_batch: Mapping[str, Any]) -> Rehearsed:
    rehearsal = _Rehearsal(cast)
    shape = _rows_and_length(micro_batch)
    inputs = {k: v for k, v in micro_batch.items() if k != "labels" and not _masks_nothing(k, v)}
    if cast.base.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        answers = micro_batch.get("labels", micro_batch.get("input_ids"))
        inputs["decoder_input_ids"] = answers  # as the model makes them from the labels
        shape = _rows_and_length({"input_ids": answers})  # logits are of these
    if accepts(cast.front, "use_cache"):
        inputs["use_cache"] = False  # as the front door has it where nothing is generated
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs)
        with (
            rehearsal.on_stage(),
            _unpacked(),
            _ungrouped(),
            _unchecked(),
            rehearsal.live,
            torch.enable_grad(),
        ):
            output = cast.front(**fakes)
            if cast.head is not None:
                output = _without_logits(output)
            held = rehearsal.live.now
            del output
            losses = _loss_works(cast, shape, rehearsal) if cast.head is not None else None
    kept = sum(rehearsal.kept.values())
    footprint = Footprint(
        kept_bytes=kept,
        hidden_bytes=max(rehearsal.hidden, default=0),
        held_bytes=max(held - kept, 0),
        workspace_bytes=max(rehearsal.workspaces.values(), default=0),
        loss_bytes=_loss_bytes(cast, shape),
        forward_bytes=rehearsal.forward_bytes,
        activation_bytes=_by_block(cast, rehearsal),
        how="rehearsed on tensors without memory",
    )
    return Rehearsed(footprint=footprint, work=_step_work(cast, rehearsal, losses))


def _by_block(cast: _Cast, rehearsal: _Rehearsal) -> tuple[int, ...]:
    """Bytes of each block's activations, all its visits together."""
    points = [*cast.points, *([cast.head] if cast.head is not None else [])]
    return tuple(rehearsal.saved[block] for block in range(1 + max(p.block for p in points)))


def _step_work(cast: _Cast, rehearsal: _Rehearsal, losses: tuple[Work, Work] | None) -> StepWork:
    """losses: of the head's visit, with its gradient and without."""
    passes: dict[str, dict[tuple[int, Direction], list[Work]]] = {}
    for kind, loss in zip(("train", "forward"), losses or (None, None), strict=True):
        passes[kind] = {key: list(works) for key, works in rehearsal.passes.items()}
        if loss is not None and cast.head is not None:
            passes[kind].setdefault((cast.head.block, Direction.FORWARD), []).append(loss)
    between = Counter(
        Operator("pointwise", 3.0 * p.nbytes) for p in cast.base.parameters() if p.requires_grad
    )
    return StepWork(
        passes=passes,
        between=Work({key: ADAMW_OPERATORS * n for key, n in between.items()}),
        behind=rehearsal.behind,
        dtype=str(cast.base.dtype).removeprefix("torch."),
    )


def _loss_works(cast: _Cast, shape: tuple[int, int], rehearsal: _Rehearsal) -> tuple[Work, Work]:
    """The head's visit with its gradient and without: logits and loss of each chunk, as `visit/loss.py` makes them."""
    weight = _without_memory(cast.base.get_output_embeddings().weight, cast.device)
    tokens, chunk = shape[0] * shape[1], min(cast.chunk_tokens, shape[0] * shape[1])
    both: Counter[Operator] = Counter()
    alone: Counter[Operator] = Counter()
    by_autograd = 0
    for rows, times in ((chunk, tokens // chunk), (tokens % chunk, 1)):
        if not rows:
            continue
        hidden = torch.empty(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        target = torch.empty(rows, dtype=torch.long, device=weight.device)
        with torch.no_grad(), rehearsal.forward_alone():
            F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")
        with WorkCounter() as counter:
            logits = F.linear(hidden.requires_grad_(), weight.detach()).float()
            loss = F.cross_entropy(logits, target, reduction="sum")
            forward, in_forward = dict(counter.counts), counter.num_calls
            torch.autograd.grad(loss, hidden)
        by_autograd += times * (counter.num_calls - in_forward)
        for total, counts in ((both, counter.counts), (alone, forward)):
            for key, number in counts.items():
                total[key] += times * number
    return Work(dict(both), by_autograd), Work(dict(alone))


class _Rehearsal:
    """Stands for every block's forward: runs it without a graph, holds its inputs as a visit does, counts."""

    def __init__(self, cast: _Cast) -> None:
        self.cast = cast
        self.live = LiveBytes()
        self.kept: dict[int, int] = {}  # storage -> bytes of an input kept for backward
        self.hidden: list[int] = []
        self.workspaces: dict[Any, int] = {}  # kind of block -> bytes
        self.works: dict[tuple[Any, Direction], Work] = {}  # kind of block, direction -> work
        self.passes: dict[tuple[int, Direction], list[Work]] = {}
        self.behind: dict[int, list[Work]] = {}  # backward without computing again
        self.saved: Counter[int] = Counter()  # block -> bytes that it would keep instead
        self._saved_by: dict[Any, tuple[int, Work]] = {}  # kind of block -> those two of one visit
        self.forward_bytes = 0  # the most that a forward without a graph holds beyond its input
        self._alive: list[torch.Tensor] = []
        self._before: dict[nn.Module, dict[str, Any]] = {}  # what it was that has been furnished
        self._outputs: dict[Any, Any] = {}  # kind of block and its arguments -> what it makes

    @contextlib.contextmanager
    def on_stage(self) -> Iterator[None]:
        """Blocks are ours and parameters without memory, for a `with` block: at once those that a forward may come
        across outside of blocks, and the first block's of each kind; the others' when they are computed."""
        forwards: list[tuple[nn.Module, Any]] = []
        stages: list[tuple[nn.Module, Callable[..., Any]]] = [
            (point.module, _Stage(self, point)) for point in self.cast.points
        ]
        if self.cast.head is not None:
            stages.append((self.cast.head.module, _NoLogits(self.cast.head.module, self._alive)))
        seen: set[Any] = set()
        later: set[nn.Module] = set()
        for point in self.cast.points:
            kind = _kind_of(point.module)
            if kind in seen:
                later.update(point.module.modules())
            seen.add(kind)
        try:
            self._furnish(module for module in self.cast.base.modules() if module not in later)
            for module, stage in stages:
                forwards.append((module, module.__dict__.get("forward")))
                module.forward = stage  # type: ignore[method-assign]
            yield
        finally:
            for module, forward in forwards:
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward
            for module, parameters in self._before.items():
                module._parameters.update(parameters)
            self._before.clear()
            self._alive.clear()

    def _furnish(self, modules: Iterable[nn.Module]) -> None:
        """Gives each its parameters without memory, once."""
        for module in modules:
            if module in self._before:
                continue
            self._before[module] = dict(module._parameters)
            with self.live.uncounted():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = _without_memory(parameter, self.cast.device)

    def play(self, point: _Point, args: Any, kwargs: Any) -> Any:
        """One block's forward."""
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        kind = _kind_of(point.module)
        is_new = kind not in self.workspaces
        if is_new:
            self.workspaces[kind] = self._workspace(kind, point, args, kwargs)
        for i, x in enumerate(tensors):
            self._alive.append(x)
            if x.is_floating_point() and (i == 0 or x.requires_grad):
                self.kept[x.untyped_storage()._cdata] = x.nbytes
                self.hidden.append(x.nbytes)
        out = self._output(kind, point, args, kwargs)
        for direction in Direction:
            self.add(point, direction, self.works[kind, direction])
        num_bytes, behind = self._saved_by[kind]
        self.saved[point.block] += num_bytes
        self.behind.setdefault(point.block, []).append(behind)
        return pytree.tree_map_only(
            torch.Tensor, lambda x: x.requires_grad_() if x.is_floating_point() else x, out
        )

    def _output(self, kind: Any, point: _Point, args: Any, kwargs: Any) -> Any:
        """What the block makes of its arguments; of equal ones, what a block of its kind made before."""
        call = _call_of(args, kwargs)
        if call is not None and (kind, call) in self._outputs:
            made = self._outputs[kind, call]
            return pytree.tree_map_only(_Like, lambda like: like.tensor(), made)
        self._furnish(point.module.modules())
        is_new = (kind, Direction.FORWARD) not in self.works
        counter = WorkCounter()
        with (
            torch.no_grad(),
            self.forward_alone(),
            counter if is_new else contextlib.nullcontext(),
        ):
            out = point.inner(*args, **kwargs)
        if is_new:
            self.works[kind, Direction.FORWARD] = Work(dict(counter.counts))
        if call is not None and _call_of(out, None) is not None:
            self._outputs[kind, call] = pytree.tree_map_only(torch.Tensor, _Like.of, out)
        return out

    @contextlib.contextmanager
    def forward_alone(self) -> Iterator[None]:
        """Notes what a forward without a graph takes, for a `with` block."""
        before = self.live.peak = self.live.now
        yield
        self.forward_bytes = max(self.forward_bytes, self.live.peak - before)

    def add(self, point: _Point, direction: Direction, work: Work) -> None:
        """One more visit of the meeting point's block."""
        self.passes.setdefault((point.block, direction), []).append(work)

    def _workspace(self, kind: Any, point: _Point, args: Any, kwargs: Any) -> int:
        """Bytes beyond the inputs that recompute and backward hold at once."""
        self._furnish(point.module.modules())
        before = self.live.peak = self.live.now
        leaves: list[torch.Tensor] = []

        def leaf(x: torch.Tensor) -> torch.Tensor:
            made = x.detach()
            # Tables such as a rotary embedding's have no gradient; the first float is the hidden state.
            if made.is_floating_point() and (x.requires_grad or not leaves):
                leaves.append(made.requires_grad_())
            return made

        args, kwargs = pytree.tree_map_only(torch.Tensor, leaf, (args, kwargs))
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        with WorkCounter() as counter:
            with saving([*given, *point.module.parameters()]) as saved:
                found = pytree.tree_leaves(point.inner(*args, **kwargs))
            outs = [x for x in found if isinstance(x, torch.Tensor) and x.requires_grad]
            inputs = [*leaves[:1], *(p for p in point.module.parameters() if p.requires_grad)]
            in_forward, before_backward = counter.num_calls, Counter(counter.counts)
            if outs and inputs:
                grads = [torch.empty_like(x) for x in outs]
                torch.autograd.grad(outs, inputs, grads, allow_unused=True)
        by_autograd = counter.num_calls - in_forward
        self.works[kind, Direction.BACKWARD] = Work(dict(counter.counts), by_autograd)
        behind = Counter(counter.counts) - before_backward
        self._saved_by[kind] = sum(saved), Work(dict(behind), by_autograd)
        return self.live.peak - before


@dataclasses.dataclass(frozen=True, slots=True)
class _Like:
    """What a tensor is without its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: torch.Tensor) -> _Like:
        return _Like(x.shape, x.dtype, x.device)

    def tensor(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def _kind_of(module: nn.Module) -> Any:
    """Equal for blocks that compute alike: of one class, with parameters of the same shapes."""
    return (type(module), *(tuple(p.shape) for p in module.parameters()))


PLAIN = (int, float, str, bool, type(None), torch.dtype)


def _call_of(args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """Arguments as a key; None where some can be written to (dicts that layers share, caches) or compared in no way."""
    leaves, tree = pytree.tree_flatten(
        (args, kwargs), is_leaf=lambda x: x is not kwargs and isinstance(x, dict | list)
    )
    told: list[Any] = [tree]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            told.append((_Like.of(leaf), leaf.requires_grad))
        elif isinstance(leaf, PLAIN):
            told.append(leaf)
        else:
            return None
    return tuple(told)


class _Stage:
    """A block's forward in a rehearsal."""

    def __init__(self, rehearsal: _Rehearsal, point: _Point) -> None:
        self.rehearsal, self.point = rehearsal, point

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `_Rehearsal.play`."""
        return self.rehearsal.play(self.point, args, kwargs)


class _NoLogits:
    """The forward of a head whose logits are counted chunk by chunk: as wide as they are, for a bias that is added to
    them, and without their memory. What they would be made of stays alive, as it does until the head's visit."""

    def __init__(self, head: nn.Module, alive: list[torch.Tensor]) -> None:
        weight = getattr(head, "weight", None)
        self._width = None if weight is None else weight.shape[0]
        self._alive = alive

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See above."""
        self._alive.append(hidden)
        if self._width is None:
            return hidden[..., :0]
        return hidden[..., :1].expand(*hidden.shape[:-1], self._width)


def _without_logits(output: Any) -> list[Any]:
    """What else a model gives back: where logits are not made, what is made of them is not there either."""
    named = output.items() if isinstance(output, Mapping) else enumerate(output)
    return [value for name, value in named if name not in ("logits", 0)]


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


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """transformers compares values that are not there, image tokens with the images' features above all; it has a
    variable that turns such checks off."""
    before = os.environ.get(CHECKS_OFF)
    os.environ[CHECKS_OFF] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[CHECKS_OFF]
        else:
            os.environ[CHECKS_OFF] = before


@contextlib.contextmanager
def _ungrouped() -> Iterator[None]:
    """Experts as one: how many rows each gets is not known without values, their sum is, and with it the product's
    FLOP. (Tensors without memory know grouped products in bf16 alone.)"""
    grouped = F.grouped_mm

    def as_one(rows: torch.Tensor, experts: torch.Tensor, **more: Any) -> torch.Tensor:
        return rows @ experts[0]

    F.grouped_mm = as_one
    try:
        yield
    finally:
        F.grouped_mm = grouped


def _without_memory(parameter: torch.Tensor, device: torch.device) -> nn.Parameter:
    """Inside a FakeTensorMode: a parameter like this one on the device, weights that are nowhere yet included."""
    made = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=parameter.dtype, device=device
    )
    return nn.Parameter(made, requires_grad=parameter.requires_grad)


def _masks_nothing(name: str, value: Any) -> bool:
    return name == "attention_mask" and isinstance(value, torch.Tensor) and bool((value == 1).all())


def _rows_and_length(micro_batch: Mapping[str, Any]) -> tuple[int, int]:
    ids = micro_batch.get("input_ids", micro_batch.get("inputs_embeds"))
    if not isinstance(ids, torch.Tensor):
        return 1, 1
    return ids.shape[0], ids.shape[1]


def _loss_bytes(cast: _Cast, shape: tuple[int, int]) -> int:
    """Logits and gradients of one chunk, or of the micro-batch where that is less."""
    config = cast.base.config.get_text_config()
    tokens = min(shape[0] * shape[1], cast.chunk_tokens)
    is_capped = getattr(config, "final_logit_softcapping", None) is not None
    return chunk_bytes(tokens, config.vocab_size, dtype=cast.base.dtype, softcapped=is_capped)


def _by_formula(cast: _Cast, shape: tuple[int, int], why: str) -> Footprint:
    """For decoder layers: what norms, attention and a gated MLP keep for backward, per token.

    16 values of the model's width (two norms with fp32 copies, q, k, v, rotated and plain, attention's result,
    residuals, gradients) and 8 of the MLP's (gate, up, their product, activation and gradients). A forward alone: 6
    and 3.
    """
    config = cast.base.config.get_text_config()
    tokens, size = shape[0] * shape[1], cast.base.dtype.itemsize
    width = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    hidden = tokens * width * size
    return Footprint(
        kept_bytes=hidden * max(len(cast.points) - 1, 1),
        hidden_bytes=hidden,
        held_bytes=3 * tokens * width * 4,
        workspace_bytes=tokens * (16 * width + 8 * inner) * size,
        loss_bytes=_loss_bytes(cast, shape),
        forward_bytes=max(tokens * (6 * width + 3 * inner) * size, _loss_bytes(cast, shape)),
        how=f"by formula, since the model can't be rehearsed: {why}",
    )
