"""From a configuration to a `Job`: the model's config and headers, its adapters, its rows; weights are not read.

A job is kept in the cache under a hash of all that it depends on, so that the next `ssdtune plan` of the same files
needs neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.cache import cache_folder
from ssdtune.durable import write_file_atomically
from ssdtune.schedule.job import Job, Rows, job_from

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.visit.build import MetaModel
    from ssdtune.visit.draft import Draft

FORMAT = 5  # of jobs in the cache; one more when their making changes
SAMPLE_ROWS = 2000  # of a data set that are tokenized to estimate the rest
KEPT_JOBS = 200
# Keys that change blocks, work or rows.
MODEL_KEYS = (
    "model_name_or_path model_revision trust_remote_code dtype quantization attn_implementation lora_r lora_alpha "
    "lora_dropout lora_target_modules lora_modules_to_save use_dora use_rslora "
    "per_device_train_batch_size gradient_accumulation_steps max_length overlong train_on chat_template "
    "num_train_epochs max_steps optim method zo_trains zo_estimator zo_num_directions zo_rank zo_fold_steps"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a job comes from. model: a folder, a hub id or a config.json, instead of the configuration's.

    on_device: whether blocks are laid out for a device. has_data: whether the configuration's rows are looked at.
    """

    config: TrainConfig
    model: str | None = None
    on_device: bool = False
    has_data: bool = True

    @staticmethod
    def of(config: TrainConfig, model: str | None, *, on_device: bool) -> Source:
        """With the configuration's data where they are here, and a tokenizer with the model."""
        is_config = model is not None and model.endswith(".json")
        missing = any(not path.exists() for path in map(Path, _local(config)))
        return Source(
            config=config,
            model=model,
            on_device=on_device,
            has_data=not missing and not is_config,
        )

    @property
    def name(self) -> str:
        """Of the model."""
        return str(self.config.model_name_or_path) if self.model is None else self.model


def _local(config: TrainConfig) -> Iterator[str]:
    """Paths of data files that would be on this machine: no hub ids, no patterns."""
    for entry in config.dataset:
        path = os.path.expanduser(entry.path)
        if Path(path).suffix and not any(sign in path for sign in "*?["):
            yield path


def job_of(source: Source) -> Job:
    """The job, from the cache where nothing that it depends on has changed. Raises SSDTuneError as training would."""
    key = _key(source)
    path = None if key is None else cache_folder() / "jobs" / f"{key}.json"
    if path is not None and path.is_file():
        try:
            return job_from(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)  # cut short, or another version's: made anew
    job = _made(source)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file_atomically(path, job.to_json().encode())
        _forget_old(path.parent)
    return job


# ------------------------------------------------------------------ the cache


def _key(source: Source) -> str | None:
    """A hash of all that the job depends on; None where some of it can't be told (a hub id, a pattern)."""
    from ssdtune import __version__
    from ssdtune.settings import write_record

    folder = Path(source.name).expanduser()
    files = [folder] if folder.is_file() else sorted(folder.glob("*"))
    if not files:
        return None
    values = write_record(source.config)
    states = [*_states(f for f in files if f.suffix in (".safetensors", ".gguf", ".json", ".py"))]
    if source.has_data:
        paths = [Path(entry.path).expanduser() for entry in source.config.dataset]
        if not all(path.is_file() for path in paths):
            return None
        states += [*_states(paths), json.dumps(values.get("dataset"), default=str)]
    told = {name: values.get(name) for name in MODEL_KEYS}
    offload = source.config.offload
    told |= {"chunk": offload.loss_chunk_tokens, "storage": offload.storage}
    told |= {"on_device": source.on_device, "has_data": source.has_data}
    text = json.dumps([FORMAT, __version__, told, source.name, states], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _states(paths: Iterator[Path] | Sequence[Path]) -> Iterator[str]:
    for path in paths:
        state = os.stat(path)
        yield f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"


def _forget_old(folder: Path) -> None:
    jobs = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in jobs[:-KEPT_JOBS]:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------ making one


def _made(source: Source) -> Job:
    import peft  # noqa: F401 (as a run does before it looks at what it holds)
    from transformers.utils import logging

    from ssdtune.report import hush_libraries
    from ssdtune.visit.memory import resident_set_bytes

    logging.set_verbosity_error()
    hush_libraries()
    base_bytes = resident_set_bytes()  # libraries are there, nothing else: what a run begins with
    path = Path(source.name).expanduser()
    if not path.is_file() or path.suffix == ".gguf":
        return _job(source, source.name, base_bytes)
    from ssdtune.visit.outline import write_outline

    with tempfile.TemporaryDirectory(prefix="ssdtune-outline-") as scratch:
        write_outline(path, Path(scratch), source.config.dtype)
        return _job(source, scratch, base_bytes)


def _job(source: Source, model: str, base_bytes: int) -> Job:
    import torch

    from ssdtune.api import build_arguments
    from ssdtune.packing.once import build_planned
    from ssdtune.peft import attach, lora_config
    from ssdtune.schedule.memory import MOST_STATES, NUM_STATES, Fixed
    from ssdtune.trainer.run import trains_all
    from ssdtune.visit.draft import draft
    from ssdtune.visit.rehearsal import rehearse_draft

    config = source.config
    meta = build_planned(model, **build_arguments(config))
    options = _options(source, meta)
    drafted = draft(meta, options)
    resident = _resident_bytes(meta, {n for group in drafted.groups for n in group.parameters})
    dtypes = [str(p.dtype).removeprefix("torch.") for p in meta.model.parameters()]
    num_parameters = sum(p.numel() for p in meta.model.parameters())
    rows, sequences = _rows(source, meta)
    base: Any = meta.model
    is_of_all = trains_all(config)
    with torch.device("meta"):  # adapters too have no memory yet
        adapted = base if is_of_all else attach(base, lora_config(config, base))
    on_cpu = dataclasses.replace(options, device=torch.device("cpu"))
    at_once = config.per_device_train_batch_size

    def rehearsed(length: int) -> Any:
        batch = {"input_ids": torch.zeros(at_once * sequences, length, dtype=torch.long)}
        return rehearse_draft(adapted, drafted, on_cpu, batch)

    usual = rehearsed(round(rows.padded_tokens))
    longest = usual if round(rows.padded_tokens) == rows.longest else rehearsed(rows.longest)
    trained = [p for p in adapted.parameters() if p.requires_grad] if not is_of_all else []
    trained_bytes = sum(p.nbytes for p in trained)
    steps = _steps(config, drafted, trained, resident if is_of_all else 0)
    request = drafted.replanner.request
    return Job(
        model=Path(source.name).name if source.model is None else source.name,
        architecture=type(base).__name__,
        dtype=statistics.mode(dtypes),
        num_parameters=num_parameters,
        num_trained=num_parameters if is_of_all else sum(p.numel() for p in trained),
        blocks=request.blocks,
        orders=request.orders,
        work=usual.work,
        footprint=longest.footprint,
        fixed=Fixed(
            base_bytes=base_bytes,
            resident_bytes=resident,
            trained_bytes=trained_bytes,
            gradient_bytes=trained_bytes,
            optimizer_bytes=NUM_STATES.get(str(config.optim), MOST_STATES) * trained_bytes,
            more=steps.more,
        ),
        rows_at_once=at_once,
        micro_batches=config.gradient_accumulation_steps,
        num_steps=config.max_steps if config.max_steps > 0 else None,
        num_epochs=config.num_train_epochs,
        chunk_tokens=options.chunk_tokens,
        method=steps.words,
        data=rows,
        kind=steps.kind,
        variants=steps.variants,
        fold_steps=steps.fold_steps,
    )


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What the method makes of a step."""

    words: str
    kind: str = "train"
    variants: int = 1
    fold_steps: int = 0
    more: dict[str, int] = dataclasses.field(default_factory=dict)


def _steps(config: TrainConfig, drafted: Draft, adapter: list[Any], outside_bytes: int) -> _Steps:
    """adapter: its parameters, all inside blocks. outside_bytes: of what else is moved and lies in memory."""
    words = f"{'DoRA' if config.use_dora else 'LoRA'} r{config.lora_r}"
    if config.method != "zo":
        return _Steps(words)
    from ssdtune.trainer.run import trains_all
    from ssdtune.trainer.zeroth_order import estimator_of
    from ssdtune.zeroth_order.weights import extra_bytes, inside_bytes

    shifts = estimator_of(config).variants
    is_of_all = trains_all(config)
    blocks = [block.slot_bytes for block in drafted.replanner.request.blocks]
    held = {id(p) for p in adapter}
    inside = [
        inside_bytes(
            p for point in group.points for p in point.module.parameters() if id(p) in held
        )
        for group in drafted.groups
    ]
    return _Steps(
        words=f"{config.zo_estimator.upper()} over {'all weights' if is_of_all else words}",
        kind="forward",
        variants=len(shifts),
        fold_steps=(config.zo_fold_steps or 0) if is_of_all else 0,
        more=extra_bytes(
            shifts, block=max(blocks) if is_of_all else max(inside), outside=outside_bytes
        ),
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


def _resident_bytes(meta: MetaModel, streamed: set[str]) -> int:
    """Parameters and buffers outside of blocks."""
    parameters = meta.model.named_parameters()
    outside = sum(p.nbytes for name, p in parameters if name not in streamed)
    return outside + sum(b.nbytes for b in meta.model.buffers())


def _rows(source: Source, meta: MetaModel) -> tuple[Rows, int]:
    """Counted, or estimated from the first SAMPLE_ROWS; without data every row is as long as may be. And the texts that
    a row becomes in a micro-batch."""
    config = source.config
    if not source.has_data:
        length = config.max_length
        unknown = Rows(
            num=0,
            mean_tokens=length,
            padded_tokens=length,
            longest=length,
            trained_share=1.0,
            is_estimate=True,
        )
        return unknown, 1
    from ssdtune.data import load_dataset_rows, tokenize_rows
    from ssdtune.trainer.run import load_tokenizer

    opened = [load_dataset_rows(entry) for entry in config.dataset]
    num_rows = sum(len(rows) for rows in opened)
    sample = [rows.first(SAMPLE_ROWS) for rows in opened]
    tokenizer = load_tokenizer(config, meta.folder)
    tokenized = tokenize_rows(
        sample,
        tokenizer,
        max_length=config.max_length,
        overlong=config.overlong,
        train_on=config.train_on,
        chat_template=config.chat_template,
    )
    lengths, at_once = tokenized.lengths(len(tokenized)), config.per_device_train_batch_size
    padded = [max(lengths[i : i + at_once]) for i in range(0, len(lengths), at_once)]
    num_sampled = sum(len(rows) for rows in sample)
    counted = Rows(
        num=round(num_rows * len(tokenized) / num_sampled),
        mean_tokens=statistics.mean(lengths),
        padded_tokens=statistics.mean(padded),
        longest=tokenized.stats.longest_row,
        trained_share=tokenized.stats.trained_share,
        is_estimate=num_sampled < num_rows,
    )
    return counted, tokenized.sequences_per_row
