"""`ssdtune plan`: what would be where, and when. No weights are read, nothing is trained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ssdtune.report import LANE_LABELS, hush_libraries, say
from ssdtune.sizes import format_size

if TYPE_CHECKING:
    from ssdtune.api import Planned
    from ssdtune.config import Loaded, Offload, TrainConfig


def print_plan(loaded: Loaded) -> int:
    """Prints the plan of a configuration's training step; returns 0. `loaded.notes` are the caller's.

    Raises SSDTuneError, as training would before it starts: PlanError where a budget is too small.
    """
    from transformers.utils import logging

    from ssdtune.api import plan, stream_arguments

    logging.set_verbosity_error()
    hush_libraries()
    config = loaded.config
    planned = plan(config.model_name_or_path, **stream_arguments(config))
    told = itertools.chain(plan_lines(planned, config.offload), prediction_lines(planned, config))
    for line in told:  # the plan is there before its time is worked out
        say(line)
    return 0


def prediction_lines(planned: Planned, config: TrainConfig) -> Iterator[str]:
    """Yields what a step of rows of `max_length` would take on this machine, where it has been measured.

    Raises ProfileError for a profile that is broken.
    """
    import torch

    from ssdtune.peft import attach, lora_config
    from ssdtune.profiles import own_profile
    from ssdtune.schedule.cost import predict_step
    from ssdtune.visit.rehearsal import rehearse_draft

    profile = own_profile()
    if profile is None:
        yield "predicted nothing: measure this machine with `ssdtune probe`, then plans tell times"
        return
    base: Any = planned.meta.model
    rows = config.per_device_train_batch_size
    with torch.device("meta"):  # adapters too have no memory yet
        adapted = attach(base, lora_config(config, base))
    batch = {"input_ids": torch.zeros(rows, config.max_length, dtype=torch.long)}
    rehearsed = rehearse_draft(adapted, planned.draft, planned.options, batch)
    if rehearsed.work is None:
        yield f"predicted nothing: the model's work can't be counted ({rehearsed.footprint.how})"
        return
    num_micro_batches = config.gradient_accumulation_steps
    found = predict_step(
        planned.plan, "train", rehearsed.work, profile, num_micro_batches=num_micro_batches
    )
    tokens = rows * config.max_length * num_micro_batches
    yield from found.lines(tokens, LANE_LABELS)


def plan_lines(planned: Planned, offload: Offload) -> Iterator[str]:
    """Yields the plan with what it was made from: model, device, storage, budgets."""
    meta, options, plan = planned.meta, planned.options, planned.plan
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in meta.model.parameters()})
    num = sum(p.numel() for p in meta.model.parameters())
    yield f"model     {type(meta.model).__name__} · {num / 1e9:.3g} B parameters · {', '.join(dtypes)}"
    yield f"files     {len(meta.checkpoint.files)} in {meta.folder}"
    into_device = "cuFile into the device, else " if plan.buffers_on_device else ""
    yield f"storage   {into_device}{options.storage.name} · {options.reader_threads} reader threads"
    yield _budget("RAM", plan.budgets.ram_bytes, offload.ram)
    if plan.on_device:
        yield _budget("VRAM", plan.budgets.device_bytes, offload.vram)
    yield from plan.lines()


def _budget(name: str, num_bytes: int, wanted: int | None) -> str:
    how = "auto, a share of what is free now" if wanted is None else f"offload.{name.lower()}"
    return f"budget    {format_size(num_bytes)} of {name} ({how})"
