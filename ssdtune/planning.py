"""`ssdtune plan`: what would be where, and when. No weights are read, nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ssdtune.report import say
from ssdtune.sizes import format_size

if TYPE_CHECKING:
    from ssdtune.api import Planned
    from ssdtune.config import Loaded, Offload


def print_plan(loaded: Loaded) -> int:
    """Prints the plan of a configuration's training step; returns 0. `loaded.notes` are the caller's.

    Raises SSDTuneError, as training would before it starts: PlanError where a budget is too small.
    """
    from transformers.utils import logging

    from ssdtune.api import plan, stream_arguments

    logging.set_verbosity_error()
    config = loaded.config
    planned = plan(config.model_name_or_path, **stream_arguments(config))
    for line in plan_lines(planned, config.offload):
        say(line)
    return 0


def plan_lines(planned: Planned, offload: Offload) -> Iterator[str]:
    """Yields the plan with what it was made from: model, device, storage, budgets."""
    meta, options, plan = planned.meta, planned.options, planned.plan
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in meta.model.parameters()})
    num = sum(p.numel() for p in meta.model.parameters())
    yield f"model     {type(meta.model).__name__} · {num / 1e9:.3g} B parameters · {', '.join(dtypes)}"
    yield f"files     {len(meta.checkpoint.files)} in {meta.folder}"
    yield f"storage   {options.storage.name} · {options.reader_threads} reader threads"
    yield _budget("RAM", plan.budgets.ram_bytes, offload.ram)
    if plan.on_device:
        yield _budget("VRAM", plan.budgets.device_bytes, offload.vram)
    yield from plan.lines()


def _budget(name: str, num_bytes: int, wanted: int | None) -> str:
    how = "auto, a share of what is free now" if wanted is None else f"offload.{name.lower()}"
    return f"budget    {format_size(num_bytes)} of {name} ({how})"
