"""A source opened: its model without weights, the draft of its blocks, adapters on it, and what its rows are."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.jobs import AUTO
from ssdtune.opened.rows import rows_of
from ssdtune.schedule.job import Reading, Rows

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.jobs import Source
    from ssdtune.packing.once import Twin
    from ssdtune.visit.build import MetaModel
    from ssdtune.visit.draft import Draft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A source's model, adapters on it, and its data, whatever the micro-batch.

    Attributes:
        base_bytes: of the process before.
        meta, options, drafted, adapted: the model, how its blocks are drafted, the draft, the model with adapters.
        resident_bytes: of what lies outside of blocks.
        num_parameters, dtype: of the model without adapters; the type is that of most of them.
        rows: as if each stood alone in its micro-batch.
        lengths: tokens of the rows that were looked at; empty: there are no data.
        sequences: texts that a row becomes in a micro-batch.
        readings, file_dtype, lossless_ratio: as `Job` has them.
        twin: the packed file that a run makes first; None: none.
    """

    base_bytes: int
    meta: MetaModel
    options: Any
    drafted: Draft
    adapted: Any
    resident_bytes: int
    num_parameters: int
    dtype: str
    rows: Rows
    lengths: Sequence[int]
    sequences: int
    readings: tuple[Reading, ...] = ()
    file_dtype: str = ""
    lossless_ratio: float | None = None
    twin: Twin | None = None


def open_source(source: Source) -> Opened:
    """Raises SSDTuneError as training would before it starts."""
    with _uncollected():
        import peft  # noqa: F401 (as a run does before it looks at what it holds)
        from transformers.utils import logging

        from ssdtune.report import hush_libraries
        from ssdtune.visit.memory import resident_set_bytes

        logging.set_verbosity_error()
        hush_libraries()
        base_bytes = (
            resident_set_bytes()
        )  # what a run begins with: libraries are there, nothing else
        path = Path(source.name).expanduser()
        if not path.is_file() or path.suffix == ".gguf":
            return _open(source, source.name, base_bytes)
        from ssdtune.visit.outline import write_outline

        with tempfile.TemporaryDirectory(prefix="ssdtune-outline-") as scratch:
            write_outline(path, Path(scratch), source.config.dtype)
            return _open(source, scratch, base_bytes)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is looked for, for a `with` block: imports make much that stays and little that goes, and the looking
    is a seventh of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open(source: Source, model: str, base_bytes: int) -> Opened:
    import torch

    from ssdtune.api import build_arguments
    from ssdtune.packing.once import NONE, build_and_plan, twin_of
    from ssdtune.packing.readings import readings_of
    from ssdtune.packing.sample import lossless_ratio
    from ssdtune.peft import attach, lora_config
    from ssdtune.trainer.opening import trains_all
    from ssdtune.visit.draft import draft

    arguments = build_arguments(source.config)
    chooses = arguments.get("quantization") == AUTO
    if chooses:
        del arguments["quantization"]
    plain, meta = build_and_plan(model, **arguments)
    options = _options(source, meta)
    drafted = draft(meta, options)
    has_weights = model == source.name  # of a config.json alone there are headers
    path = source.config.offload.path
    twin = twin_of(plain, arguments.get("quantization", NONE), path)
    readings = ()
    ratio = lossless_ratio(meta) if has_weights else None
    if chooses:  # before there are adapters
        readings = readings_of(
            meta,
            options,
            path,
            has_weights=has_weights,
            formats=_formats(source.config),
            ratio=ratio,
        )
    base: Any = meta.model
    parameters = list(base.parameters())
    resident = _resident_bytes(meta, {n for group in drafted.groups for n in group.parameters})
    rows, lengths, sequences = rows_of(source, meta)
    with torch.device("meta"):  # adapters too have no memory yet
        is_of_all = trains_all(source.config)
        adapted = base if is_of_all else attach(base, lora_config(source.config, base))
    return Opened(
        base_bytes=base_bytes,
        meta=meta,
        options=options,
        drafted=drafted,
        adapted=adapted,
        resident_bytes=resident,
        num_parameters=sum(p.numel() for p in parameters),
        dtype=statistics.mode(str(p.dtype).removeprefix("torch.") for p in parameters),
        rows=rows,
        lengths=lengths,
        sequences=sequences,
        readings=readings,
        file_dtype=_file_dtype(meta),
        lossless_ratio=ratio,
        twin=twin,
    )


def _options(source: Source, meta: MetaModel) -> Any:
    """What blocks are drafted with: nothing of this machine but, without a device, how its drive is read."""
    import torch

    from ssdtune.api import DEFAULT_CHUNK_TOKENS, choose
    from ssdtune.schedule.plan import Budgets
    from ssdtune.swap.storage import BufferedStorage
    from ssdtune.visit.draft import Options

    offload = source.config.offload
    is_here = source.model is None and not source.on_device
    return Options(
        device=torch.device("cuda" if source.on_device else "cpu"),
        budgets=Budgets(ram_bytes=0),
        storage=choose(offload.storage, meta.checkpoint.files) if is_here else BufferedStorage(),
        chunk_tokens=offload.loss_chunk_tokens or DEFAULT_CHUNK_TOKENS,
    )


def _formats(config: TrainConfig) -> tuple[str, ...]:
    """Besides affine codes, those that `quantization: auto` may pack for what the configuration does with them."""
    from ssdtune.packing.readings import TABLE
    from ssdtune.packing.wanted import LOSSLESS

    if config.method == "zo" and config.zo_packed == "moved":
        return ()  # others are not moved
    begins_at_loss = config.init_lora_weights == "loftq"
    return (*TABLE.values(),) if begins_at_loss else (*TABLE.values(), LOSSLESS)


def _file_dtype(meta: MetaModel) -> str:
    """That of most bytes of the model's tensors, as safetensors names it; of packed ones, what they are decoded to."""
    num_bytes = Counter[str]()
    for entry in meta.checkpoint.tensors.values():
        num_bytes[entry.dtype] += entry.num_bytes
    return max(num_bytes, key=lambda dtype: num_bytes[dtype], default="")


def _resident_bytes(meta: MetaModel, streamed: set[str]) -> int:
    """Parameters and buffers outside of blocks."""
    parameters = meta.model.named_parameters()
    outside = sum(p.nbytes for name, p in parameters if name not in streamed)
    return outside + sum(b.nbytes for b in meta.model.buffers())
