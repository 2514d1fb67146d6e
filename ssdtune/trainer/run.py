"""`train_from_config`: from a checked configuration to an adapter in `output_dir`.

Rows first, then the model: what is wrong with the data is said before anything large is read.
`output_dir` then holds

    adapter_config.json, adapter_model.safetensors, tokenizer, README.md   the result, in peft's form
    checkpoint-N/                                                          to resume from
    ssdtune.yaml, ssdtune.json          every key of the run; base and data it belongs to
    metrics.jsonl, results.json, trace.jsonl                               what was logged and measured
    plan.json                                                              the plan and its prediction

Every process of a distributed run comes through here; the first one writes and prints.
"""

from __future__ import annotations

import contextlib
import shlex
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ssdtune import report
from ssdtune.durable import lock_folder, remove_abandoned
from ssdtune.run_files import CONFIG_NAME, METRICS_NAME
from ssdtune.trainer.checkpoint import newest
from ssdtune.trainer.errors import RunError
from ssdtune.trainer.opening import streamed_model
from ssdtune.trainer.results import TrainResult, result_of, save_result, write_trace
from ssdtune.trainer.rows import Rows, check_sizes, load_rows
from ssdtune.trainer.together import together

if TYPE_CHECKING:
    from ssdtune.config import Loaded, TrainConfig
    from ssdtune.schedule.memory import Peak
    from ssdtune.schedule.plan import Tier
    from ssdtune.trainer.config import SSDConfig
    from ssdtune.trainer.scheduling import Watch
    from ssdtune.trainer.telemetry import Telemetry
    from ssdtune.trainer.trainer import SSDTrainer

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run begins with. base_bytes: of memory, before there is a model. resume_from: a checkpoint's folder, True
    for the newest, None to start anew."""

    base_bytes: int
    resume_from: str | bool | None


def train_from_config(loaded: Loaded, *, tells_summary: bool = True) -> TrainResult:
    """Trains as the configuration says. `loaded.notes` are the caller's to print.

    tells_summary: prints what the run came to and what to do next; it is in the result anyway.
    Raises SSDTuneError: for data, model, budget, checkpoint, or another process in `output_dir`.
    """
    from transformers.utils import logging

    from ssdtune.trainer.config import training_arguments
    from ssdtune.trainer.summary import summary_lines
    from ssdtune.visit.memory import settled_bytes

    config = loaded.config
    if config.offload.micro_batch_size == "auto":
        raise RunError(
            "offload.micro_batch_size: auto is for `ssdtune train`, which puts a number in its place.\n"
            "From Python, write a number; `ssdtune plan` says which is the fastest."
        )
    args = training_arguments(config, disable_tqdm=True)
    say = report.say if args.process_index == 0 else _silent
    with warnings.catch_warnings(), _own_folder(args, config.output_dir):
        logging.set_verbosity_error()  # what a run says is said here
        report.hush_libraries()
        rows = load_rows(config, args, say)
        import peft  # noqa: F401 (its code is the process's own, no part of the model's)

        start = Start(base_bytes=settled_bytes(), resume_from=_resume_from(config, args) or None)
        with streamed_model(config, args, say, begins_anew=start.resume_from is None) as model:
            result = _train(config, args, rows, model, start=start, say=say)
        if tells_summary and not result.was_interrupted:
            for line in summary_lines(result.metrics):
                say(line)
            say(f'next      ssdtune generate {shlex.quote(str(config.output_dir))} -p "…"')
        return result


def _silent(line: str) -> None:
    """Of several processes one speaks."""


@contextlib.contextmanager
def _own_folder(args: SSDConfig, folder: Path) -> Iterator[None]:
    """`output_dir`, locked against other runs and cleared of what a killed one left half-written."""
    if args.process_index == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"output_dir: can't make {folder}: {error.strerror}.\nChoose another folder."
            ) from error
    with lock_folder(folder) if args.process_index == 0 else contextlib.nullcontext():
        with args.main_process_first(desc="clearing output_dir"):
            if args.process_index == 0:
                remove_abandoned(folder)
        yield


def _train(
    config: TrainConfig, args: SSDConfig, rows: Rows, model: Any, *, start: Start, say: Say
) -> TrainResult:
    check_sizes(config, model, rows, say)
    trainer, telemetry = _make_trainer(config, args, rows, model)
    wanted, base_bytes = start.resume_from, start.base_bytes
    if wanted is not None:
        say(f"resuming  {wanted if wanted is not True else config.output_dir}")
    say(_job_line(trainer, rows))
    peak, watch = _settled(config, trainer, telemetry, rows, base_bytes=base_bytes, say=say)
    started = perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=wanted)
    finally:
        trainer.release()
    if not telemetry.records and trainer.state.global_step >= trainer.state.max_steps:
        say(
            f"note: all {trainer.state.global_step} steps had been made; max_steps or num_train_epochs asks for more"
        )
    metrics = {**output.metrics, "predicted_peak_bytes": peak.ram_bytes}
    if watch is not None:
        metrics["predicted_and_measured"] = watch.compared()
    result = result_of(config, trainer, telemetry, metrics)
    if args.process_index == 0:
        write_trace(config.output_dir, result, None if watch is None else watch.schedule)
    if result.was_interrupted:
        folder, seconds = trainer.checkpoints.last_saved or (config.output_dir, 0.0)
        say(f"saved     {folder} in {seconds:.1f} s. Resume: {_resume_command(config)}")
        return result
    save_result(config, trainer, rows, result)
    if watch is not None and args.process_index == 0:
        watch.keep()
    say(f"done      {config.output_dir}   {report.duration(perf_counter() - started)}")
    return result


def _resume_from(config: TrainConfig, args: SSDConfig) -> Any:
    """A checkpoint's folder, True for the newest, or nothing; the same in every process."""
    wanted: Any = config.resume_from_checkpoint
    if wanted != "auto":
        return wanted

    def look() -> str | None:
        found = newest(config.output_dir) if args.process_index == 0 else None
        return None if found is None else str(found)

    return together(look, "look for a checkpoint", args.world_size)


def _settled(
    config: TrainConfig,
    trainer: SSDTrainer,
    telemetry: Telemetry,
    rows: Rows,
    *,
    base_bytes: int,
    say: Say,
) -> tuple[Peak, Watch | None]:
    """The plan, the peak and the time of the steps to come, settled and said. No watch without predictions."""
    from ssdtune.trainer.forecast import Rehearsals, forecast, predicted, schedule_of
    from ssdtune.trainer.scheduling import Watch
    from ssdtune.trainer.settling import Auto, settle, settle_inputs
    from ssdtune.trainer.writes import check_inputs, check_writes, checked, writes_of

    lengths, offload = rows.train.lengths(), config.offload
    rehearsals = Rehearsals(trainer, lengths)
    longest = rows.train.stats.longest_row
    assert trainer.streamer is not None
    writes = writes_of(trainer, len(rows.train), offload.max_writes)
    trainer.streamer.replanner.limit_writes(writes.step_bytes)
    schedule = schedule_of(rehearsals, lengths, depth=offload.prefetch)
    auto = Auto(
        ram=offload.ram is None,
        vram=offload.vram is None,
        activations=offload.activations is None,
        drive=_drive_for(config),
        tiers=_tiers_for(config, trainer.streamer.engine.plan.on_device),
    )
    inputs = settle_inputs(
        rehearsals,
        schedule,
        longest_row=longest,
        base_bytes=base_bytes,
        auto=auto,
        folder=config.offload.path or config.output_dir,
    )
    if inputs is not None:
        say(inputs.line())
    if schedule is not None and not schedule.is_known:
        say(
            "note: times are not predicted: writing to the drive was never measured. Measure this machine anew with "
            "`ssdtune probe`"
        )
        schedule = None
    check_inputs(writes, predicted(rehearsals, longest, base_bytes))
    with checked(writes):
        changed = settle(
            rehearsals, schedule, longest_row=longest, base_bytes=base_bytes, auto=auto
        )
    if changed:
        for line in trainer.streamer.engine.plan.lines():
            say(line)
    peak = forecast(rehearsals, longest_row=longest, base_bytes=base_bytes, say=say)
    check_writes(trainer, writes, peak)
    if schedule is None:
        return peak, None
    for line in schedule.lines():
        say(line)
    watch = Watch(schedule, telemetry, say)
    trainer.add_callback(watch)
    return peak, watch


def _drive_for(config: TrainConfig) -> Path | None:
    """The folder whose free space activations may take, where nobody said how much; None: of none."""
    from ssdtune.swap.scratch import lies_in_ram

    folder = config.offload.path or config.output_dir
    is_open = config.offload.nvme_activations is None and config.method != "zo"
    return folder if is_open and not lies_in_ram(folder) else None


def _tiers_for(config: TrainConfig, on_device: bool) -> tuple[Tier, ...]:
    """Where block inputs may wait, the nearest first; empty where the configuration says it, or nothing is kept."""
    from ssdtune.schedule.grid import NEAREST_FIRST
    from ssdtune.schedule.plan import Tier
    from ssdtune.swap.scratch import lies_in_ram

    if config.offload.block_inputs != "auto" or config.method == "zo":
        return ()
    leaves = not lies_in_ram(config.offload.path or config.output_dir)
    return tuple(
        tier
        for tier in NEAREST_FIRST
        if (tier is not Tier.RAM or on_device) and (tier is not Tier.NVME or leaves)
    )


def _make_trainer(
    config: TrainConfig, args: SSDConfig, rows: Rows, model: Any
) -> tuple[SSDTrainer, Telemetry]:
    from transformers import PrinterCallback

    from ssdtune.config import to_yaml
    from ssdtune.trainer.telemetry import ConfigFile, MetricsFile, Progress, Telemetry

    telemetry, content = Telemetry(model.ssdtune), to_yaml(config).encode()
    callbacks = [
        ConfigFile(config.output_dir / CONFIG_NAME, content),
        telemetry,
        Progress(telemetry),
        MetricsFile(config.output_dir / METRICS_NAME),
    ]
    trainer = _trainer_of(config)(
        model,
        args,
        rows.train.collator(rows.pad_token_id),
        train_dataset=rows.train.dataset,
        eval_dataset=None if rows.evaluated is None else rows.evaluated.dataset,
        processing_class=rows.tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.checkpoints.extra_files[CONFIG_NAME] = content
    return trainer, telemetry


def _trainer_of(config: TrainConfig) -> Callable[..., SSDTrainer]:
    """What makes the method's trainer."""
    from functools import partial

    from ssdtune.trainer.trainer import SSDTrainer

    if config.method != "zo":
        return SSDTrainer
    from ssdtune.trainer.zeroth_order import ZOTrainer, estimator_of, fold_of, rule_of

    return partial(
        ZOTrainer,
        estimator=estimator_of(config),
        rule=rule_of(config),
        clip=config.zo_clip,
        fold=fold_of(config),
        packed=config.zo_packed,
        low_rank=config.zo_trains == "low_rank",
        master=config.zo_master,
    )


def _job_line(trainer: SSDTrainer, rows: Rows) -> str:
    from ssdtune.trainer.writes import num_steps_of, steps_per_epoch

    args = trainer.args
    processes = f" × {args.world_size} processes" if args.world_size > 1 else ""
    per_epoch = steps_per_epoch(trainer, len(rows.train))
    steps = num_steps_of(trainer, len(rows.train))
    return (
        f"job       {args.gradient_accumulation_steps} micro-batches × "
        f"{args.per_device_train_batch_size} rows{processes} a step · {steps:,} steps · "
        f"{steps / per_epoch:.3g} epochs"
    )


def _resume_command(config: TrainConfig) -> str:
    """A command that goes on from here, whatever flags this one had."""
    path = shlex.quote(str(config.output_dir / CONFIG_NAME))
    flag = (
        "" if config.resume_from_checkpoint in ("auto", True) else " --resume_from_checkpoint auto"
    )
    return f"ssdtune train {path}{flag}"
