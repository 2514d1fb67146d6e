"""A rehearsal: one micro-batch through a streamed model on tensors that have shapes but no memory.

The model's own forward, once with backward of one block of each kind and once without a graph, while every operator is
looked at: what it allocates gives the architecture's part of the peak (`Footprint`), what it computes gives the time of
a visit (`Work`). It takes about a second, reads no weights, and knows masks, experts and adapters as they are. A model
that cannot be rehearsed (its forward looks at values) gets a footprint by a formula for decoder layers, said to be, and
no work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ssdtune.schedule.cost import Operator, StepWork, Work
from ssdtune.schedule.memory import Footprint
from ssdtune.schedule.plan import Direction
from ssdtune.visit.base import base_of
from ssdtune.visit.chunked_loss import chunk_bytes
from ssdtune.visit.counting import WorkCounter
from ssdtune.visit.draft import Draft, Options
from ssdtune.visit.front_door import accepts
from ssdtune.visit.function import random_state, random_state_of
from ssdtune.visit.stage import Cast, Point, Stage
from ssdtune.visit.streamer import Streamer
from ssdtune.visit.valueless import without_memory, without_values

ADAMW_OPERATORS = (
    16  # pointwise ones of a parameter and step, clipping included, each over three tensors
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What one micro-batch takes. `work`: None where the model could not be rehearsed."""

    footprint: Footprint
    work: StepWork | None


def rehearse(model: Any, micro_batch: Mapping[str, Any]) -> Rehearsed:
    """Rehearses a streamed model, adapters and all, on one micro-batch, under the autocast of the moment; the model and
    the generators stay as they are."""
    base = base_of(model)
    streamer: Streamer = base.ssdtune
    points = [
        Point(m.module, m.block, m.inner)
        for m in streamer.meetings
        if m.module.__dict__.get("forward") is m
    ]
    last = streamer.meetings[-1]
    is_deferred = len(points) < len(streamer.meetings)
    return _rehearsed(
        Cast(
            base=base,
            front=base.__dict__["_ssdtune_front_door"].inner,
            points=points,
            head=Point(last.module, last.block, last.inner) if is_deferred else None,
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
    points = [Point(p.module, block_of[p.module], p.module.forward) for p in drafted.points]
    head = points.pop() if drafted.is_deferred else None
    return _rehearsed(
        Cast(
            base=base,
            front=base.forward,
            points=points,
            head=head,
            chunk_tokens=options.chunk_tokens,
            device=options.device,
        ),
        micro_batch,
    )


def autocast_of(settings: Any, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The autocast of a run, to rehearse under; without a cache of cast weights, as visits are. settings: with its
    `bf16` and `fp16`."""
    dtype = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def _rehearsed(cast: Cast, micro_batch: Mapping[str, Any]) -> Rehearsed:
    with _quiet("torch._subclasses.fake_tensor"), random_state_of(random_state()):
        try:
            return _rehearse(cast, micro_batch)
        except Exception as error:  # whatever a model does with values that are not there
            footprint = _by_formula(cast, _rows_and_length(micro_batch), type(error).__name__)
            return Rehearsed(footprint=footprint, work=None)


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


def _rehearse(cast: Cast, micro_batch: Mapping[str, Any]) -> Rehearsed:
    stage = Stage(cast)
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
            stage.on_stage(),
            without_values(),
            stage.live,
            torch.enable_grad(),
        ):
            output = cast.front(**fakes)
            if cast.head is not None:
                output = _without_logits(output)
            held = stage.live.now
            del output
            losses = _loss_works(cast, shape, stage) if cast.head is not None else None
            with stage.without_graph():
                cast.front(**fakes)
    kept, hidden = sum(stage.kept.values()), max(stage.hidden, default=0)
    footprint = Footprint(
        kept_bytes=kept,
        hidden_bytes=hidden,
        held_bytes=max(held - kept, 0),
        workspace_bytes=max(stage.workspaces.values(), default=0),
        loss_bytes=_loss_bytes(cast, shape),
        forward_bytes=stage.forward_bytes,
        forward_held_bytes=max(stage.waiting_bytes - hidden, 0),
        activation_bytes=_by_block(cast, stage),
        how="rehearsed on tensors without memory",
    )
    return Rehearsed(footprint=footprint, work=_step_work(cast, stage, losses))


def _by_block(cast: Cast, stage: Stage) -> tuple[int, ...]:
    """Bytes of each block's activations, all its visits together."""
    points = [*cast.points, *([cast.head] if cast.head is not None else [])]
    return tuple(stage.saved[block] for block in range(1 + max(p.block for p in points)))


def _step_work(cast: Cast, stage: Stage, losses: tuple[Work, Work] | None) -> StepWork:
    """losses: of the head's visit, with its gradient and without."""
    passes: dict[str, dict[tuple[int, Direction], list[Work]]] = {}
    for kind, loss in zip(("train", "forward"), losses or (None, None), strict=True):
        passes[kind] = {key: list(works) for key, works in stage.passes.items()}
        if loss is not None and cast.head is not None:
            passes[kind].setdefault((cast.head.block, Direction.FORWARD), []).append(loss)
    between = Counter(
        Operator("pointwise", 3.0 * p.nbytes) for p in cast.base.parameters() if p.requires_grad
    )
    return StepWork(
        passes=passes,
        between=Work({key: ADAMW_OPERATORS * n for key, n in between.items()}),
        behind=stage.behind,
        dtype=str(cast.base.dtype).removeprefix("torch."),
        autocast=_autocast_to(cast.device),
    )


def _autocast_to(device: torch.device) -> str | None:
    """The number format that products are computed in now; None: their operands'."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def _loss_works(cast: Cast, shape: tuple[int, int], stage: Stage) -> tuple[Work, Work]:
    """The head's visit with its gradient and without: logits and loss of each chunk, as `visit/chunked_loss.py` makes them."""
    weight = without_memory(cast.base.get_output_embeddings().weight, cast.device)
    tokens, chunk = shape[0] * shape[1], min(cast.chunk_tokens, shape[0] * shape[1])
    both: Counter[Operator] = Counter()
    alone: Counter[Operator] = Counter()
    by_autograd = 0
    for rows, times in ((chunk, tokens // chunk), (tokens % chunk, 1)):
        if not rows:
            continue
        hidden = torch.empty(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        target = torch.empty(rows, dtype=torch.long, device=weight.device)
        with torch.no_grad(), stage.forward_alone():
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


def _without_logits(output: Any) -> list[Any]:
    """What else a model gives back: where logits are not made, what is made of them is not there either."""
    named = output.items() if isinstance(output, Mapping) else enumerate(output)
    return [value for name, value in named if name not in ("logits", 0)]


def _masks_nothing(name: str, value: Any) -> bool:
    return name == "attention_mask" and isinstance(value, torch.Tensor) and bool((value == 1).all())


def _rows_and_length(micro_batch: Mapping[str, Any]) -> tuple[int, int]:
    ids = micro_batch.get("input_ids", micro_batch.get("inputs_embeds"))
    if not isinstance(ids, torch.Tensor):
        return 1, 1
    return ids.shape[0], ids.shape[1]


def _loss_bytes(cast: Cast, shape: tuple[int, int]) -> int:
    """Logits and gradients of one chunk, or of the micro-batch where that is less."""
    config = cast.base.config.get_text_config()
    tokens = min(shape[0] * shape[1], cast.chunk_tokens)
    is_capped = getattr(config, "final_logit_softcapping", None) is not None
    return chunk_bytes(tokens, config.vocab_size, dtype=cast.base.dtype, softcapped=is_capped)


def _by_formula(cast: Cast, shape: tuple[int, int], why: str) -> Footprint:
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
