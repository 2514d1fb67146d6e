"""From an opened source to a `Job`: what a step works on, micro-batch and all, in plain numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.opened.steps import blocks_of, directions_of, steps_of
from ssdtune.schedule.job import Job, Rows, mean_padded

if TYPE_CHECKING:
    from ssdtune.jobs import Source
    from ssdtune.opened.source import Opened
    from ssdtune.packing.once import Twin
    from ssdtune.schedule.choices import Order
    from ssdtune.schedule.cost import StepWork
    from ssdtune.schedule.memory import Fixed, Footprint


def job_from_opened(source: Source, opened: Opened) -> Job:
    """The job of the source's configuration, micro-batch and all."""
    from ssdtune.trainer.opening import trains_all

    config, drafted = source.config, opened.drafted
    base: Any = opened.meta.model
    is_of_all = trains_all(config)
    rows = opened.rows
    if opened.lengths:
        padded = mean_padded(opened.lengths, config.per_device_train_batch_size)
        rows = dataclasses.replace(rows, padded_tokens=padded)
    work, footprint = _rehearsed(source, opened, rows)
    trained = [p for p in opened.adapted.parameters() if p.requires_grad] if not is_of_all else []
    outside_bytes = opened.resident_bytes if is_of_all else 0
    steps = steps_of(source, drafted, trained, outside_bytes)
    if work is not None:
        work = dataclasses.replace(work, moves=steps.moves)
    request = drafted.replanner.request
    return Job(
        model=Path(source.name).name if source.model is None else source.name,
        architecture=type(base).__name__,
        dtype=opened.dtype,
        num_parameters=opened.num_parameters,
        num_trained=opened.num_parameters if is_of_all else sum(p.numel() for p in trained),
        blocks=blocks_of(source, drafted),
        orders=_orders(request.orders, work),
        work=work,
        footprint=footprint,
        fixed=_fixed(source, opened, sum(p.nbytes for p in trained), steps.more),
        rows_at_once=config.per_device_train_batch_size,
        micro_batches=config.gradient_accumulation_steps,
        num_steps=config.max_steps if config.max_steps > 0 else None,
        num_epochs=config.num_train_epochs,
        chunk_tokens=opened.options.chunk_tokens,
        visits_vary=request.visits_vary,
        method=steps.words,
        data=rows,
        kind=steps.kind,
        variants=steps.variants,
        fold_steps=steps.fold_steps,
        readings=opened.readings,
        file_dtype=opened.file_dtype,
        lossless_ratio=opened.lossless_ratio,
        directions=directions_of(source, steps, drafted, trained, outside_bytes),
        **_packing(opened.twin),
    )


def _rehearsed(source: Source, opened: Opened, rows: Rows) -> tuple[StepWork | None, Footprint]:
    """What a micro-batch of usual rows computes, where that is known, and what one of the longest holds."""
    import torch

    from ssdtune.visit.rehearsal import autocast_of, rehearse_draft

    num_rows = source.config.per_device_train_batch_size * opened.sequences
    on_cpu = dataclasses.replace(opened.options, device=torch.device("cpu"))

    def rehearsed(length: int) -> Any:
        batch = {"input_ids": torch.zeros(num_rows, length, dtype=torch.long)}
        with autocast_of(source.config, on_cpu.device):
            return rehearse_draft(opened.adapted, opened.drafted, on_cpu, batch)

    usual = rehearsed(round(rows.padded_tokens))
    longest = usual if round(rows.padded_tokens) == rows.longest else rehearsed(rows.longest)
    return usual.work, longest.footprint


def _fixed(source: Source, opened: Opened, trained_bytes: int, more: Mapping[str, int]) -> Fixed:
    """What is held whatever the micro-batches. more: of the method, by what it is for."""
    from ssdtune.schedule.memory import MOST_STATES, NUM_STATES, Fixed

    num_states = NUM_STATES.get(str(source.config.optim), MOST_STATES)
    return Fixed(
        base_bytes=opened.base_bytes,
        resident_bytes=opened.resident_bytes,
        trained_bytes=trained_bytes,
        gradient_bytes=trained_bytes,
        optimizer_bytes=num_states * trained_bytes,
        library_bytes=_library_bytes(source, opened),
        more=more,
    )


def _library_bytes(source: Source, opened: Opened) -> int:
    """What the math libraries come to hold, were this processor to compute."""
    import torch

    from ssdtune.visit.libraries import library_bytes
    from ssdtune.visit.rehearsal import autocast_of

    with autocast_of(source.config, torch.device("cpu")):
        dtype = getattr(torch, opened.dtype)
        return library_bytes([dtype], lengths_vary=len(set(opened.lengths)) > 1)


def _packing(twin: Twin | None) -> dict[str, Any]:
    """What a job says of the packed file that is made for it."""
    if twin is None:
        return {}
    return {
        "packed_bytes": twin.num_bytes,
        "packed_folder": str(twin.folder),
        "source_bytes": twin.source_bytes,
    }


def _orders(likely: Mapping[str, Order], work: StepWork | None) -> Mapping[str, Order]:
    """Without the blocks that these rows do not visit: a vision tower's, where there are no images."""
    if work is None:
        return likely
    visited = {block for passes in work.passes.values() for block, _ in passes}
    return {
        kind: [(block, direction) for block, direction in order if block in visited]
        for kind, order in likely.items()
    }
