"""From an opened source to a `Job`: what a step works on, micro-batch and all, in plain numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.opened.steps import blocks_of, directions_of, steps_of
from ssdtune.schedule.job import Job, mean_padded

if TYPE_CHECKING:
    from ssdtune.jobs import Source
    from ssdtune.opened.source import Opened
    from ssdtune.packing.once import Twin
    from ssdtune.schedule.choices import Order
    from ssdtune.schedule.cost import StepWork


def job_from_opened(source: Source, opened: Opened) -> Job:
    """The job of the source's configuration, micro-batch and all."""
    import torch

    from ssdtune.schedule.memory import MOST_STATES, NUM_STATES, Fixed
    from ssdtune.trainer.opening import trains_all
    from ssdtune.visit.rehearsal import autocast_of, rehearse_draft

    config, drafted, adapted = source.config, opened.drafted, opened.adapted
    base: Any = opened.meta.model
    is_of_all = trains_all(config)
    at_once = config.per_device_train_batch_size
    on_cpu = dataclasses.replace(opened.options, device=torch.device("cpu"))
    rows = opened.rows
    if opened.lengths:
        rows = dataclasses.replace(rows, padded_tokens=mean_padded(opened.lengths, at_once))

    def rehearsed(length: int) -> Any:
        batch = {"input_ids": torch.zeros(at_once * opened.sequences, length, dtype=torch.long)}
        with autocast_of(config, on_cpu.device):
            return rehearse_draft(adapted, drafted, on_cpu, batch)

    usual = rehearsed(round(rows.padded_tokens))
    longest = usual if round(rows.padded_tokens) == rows.longest else rehearsed(rows.longest)
    trained = [p for p in adapted.parameters() if p.requires_grad] if not is_of_all else []
    trained_bytes = sum(p.nbytes for p in trained)
    outside_bytes = opened.resident_bytes if is_of_all else 0
    steps = steps_of(source, drafted, trained, outside_bytes)
    work = usual.work
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
        footprint=longest.footprint,
        fixed=Fixed(
            base_bytes=opened.base_bytes,
            resident_bytes=opened.resident_bytes,
            trained_bytes=trained_bytes,
            gradient_bytes=trained_bytes,
            optimizer_bytes=NUM_STATES.get(str(config.optim), MOST_STATES) * trained_bytes,
            library_bytes=_library_bytes(source, opened),
            more=steps.more,
        ),
        rows_at_once=at_once,
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
