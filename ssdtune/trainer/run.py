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
import dataclasses
import json
import math
import resource
import shlex
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ssdtune import report
from ssdtune.durable import (
    MARKER_NAME,
    lock_folder,
    new_temporary_folder,
    remove_abandoned,
    remove_folder_we_made,
    write_file_atomically,
)
from ssdtune.errors import SSDTuneError
from ssdtune.run_files import CONFIG_NAME, METRICS_NAME, PLAN_NAME, RESULTS_NAME, TRACE_NAME
from ssdtune.trainer.checkpoint import IDENTITY_NAME, newest

if TYPE_CHECKING:
    from ssdtune.config import DatasetSource, Loaded, TrainConfig
    from ssdtune.data import Tokenized
    from ssdtune.schedule.memory import Peak
    from ssdtune.schedule.plan import Tier
    from ssdtune.schedule.trace import TraceOp
    from ssdtune.trainer.config import SSDConfig
    from ssdtune.trainer.scheduling import Schedule, Watch
    from ssdtune.trainer.telemetry import Telemetry
    from ssdtune.trainer.trainer import SSDTrainer

WEIGHTS_SUFFIX = ".safetensors"

Say = Callable[[str], None]


class RunError(SSDTuneError):
    """A run that cannot start; the message names the key."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    metrics: numbers of the whole run (losses, seconds, bytes; see telemetry.summary). log_history:
    as TrainerState keeps it. trace: ops of the last few steps. was_interrupted: stopped by a
    signal, saved; the same command again goes on.
    """

    metrics: dict[str, Any]
    log_history: list[dict[str, Any]]
    trace: list[TraceOp]
    output_dir: Path
    was_interrupted: bool = False


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run, tokenized, and what pads them."""

    tokenizer: Any
    train: Tokenized
    evaluated: Tokenized | None
    pad_token_id: int


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

    from ssdtune.config import to_yaml
    from ssdtune.trainer.config import training_arguments
    from ssdtune.trainer.telemetry import summary_lines
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
        rows = _load_rows(config, args, say)
        if args.process_index == 0:
            content = to_yaml(config).encode()
            write_file_atomically(config.output_dir / CONFIG_NAME, content)
        import peft  # noqa: F401 (its code is the process's own, no part of the model's)

        start = Start(base_bytes=settled_bytes(), resume_from=_resume_from(config, args) or None)
        with _streamed_model(config, args, start, say) as model:
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


# ------------------------------------------------------------------ rows


def _load_rows(config: TrainConfig, args: SSDConfig, say: Say) -> Rows:
    from ssdtune.data import choose_pad_token, preview, read_chat_template

    tokenizer = load_tokenizer(config)
    if config.chat_template != "auto":
        tokenizer.chat_template = read_chat_template(tokenizer, config.chat_template)
    with args.main_process_first(desc="tokenizing"):  # the others find it in the cache
        train = _tokenize(config, config.dataset, tokenizer)
        evaluated = None
        if config.eval_dataset:
            evaluated = _tokenize(config, config.eval_dataset, tokenizer)
            _check_options(train, evaluated)
    pad = choose_pad_token(tokenizer)
    for line in train.stats.lines():
        say(line)
    if evaluated is not None:
        for line in evaluated.stats.lines():
            say(line.replace("data      ", "eval data ", 1))
    if pad.note:
        say(f"          {pad.note}")
    say(f"first sample: {preview(train, tokenizer)}")
    return Rows(tokenizer=tokenizer, train=train, evaluated=evaluated, pad_token_id=pad.token_id)


def load_tokenizer(config: TrainConfig, folder: Path | None = None) -> Any:
    """The model's tokenizer, or the one saved in `folder`. Raises RunError."""
    keywords = {} if folder else {"revision": config.model_revision}
    return open_tokenizer(
        str(folder or config.model_name_or_path),
        trust_remote_code=config.trust_remote_code,
        **keywords,
    )


def open_tokenizer(name: str, **keywords: Any) -> Any:
    """The tokenizer of a folder, a hub id or a GGUF file. keywords: of `from_pretrained`. Raises RunError."""
    from transformers import AutoTokenizer

    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        has_own = (path.parent / "tokenizer.json").is_file()
        trusts = {k: v for k, v in keywords.items() if k == "trust_remote_code"}
        name = str(path.parent)
        keywords = trusts if has_own else {**trusts, "gguf_file": path.name}
    try:
        return AutoTokenizer.from_pretrained(name, **keywords)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"model_name_or_path: {name} has no tokenizer that could be loaded: {reason}\n"
            "Put tokenizer.json and tokenizer_config.json beside the model's weights."
        ) from error


def _tokenize(config: TrainConfig, sources: tuple[DatasetSource, ...], tokenizer: Any) -> Tokenized:
    from ssdtune.data import load_dataset_rows, tokenize_rows

    return tokenize_rows(
        [load_dataset_rows(source) for source in sources],
        tokenizer,
        max_length=config.max_length,
        overlong=config.overlong,
        train_on=config.train_on,
    )


def _check_options(train: Tokenized, evaluated: Tokenized) -> None:
    """What is evaluated is what is trained: a choice among as many options, or a text."""
    if train.num_options != evaluated.num_options:
        raise RunError(
            f"eval_dataset: its rows have {evaluated.num_options or 'no'} label_words, those of dataset have "
            f"{train.num_options or 'none'}.\n"
            "Write the same template and label_words in both."
        )


# ------------------------------------------------------------------ model


@contextlib.contextmanager
def _streamed_model(config: TrainConfig, args: SSDConfig, start: Start, say: Say) -> Iterator[Any]:
    """The streamed model with its adapter; its threads end with the `with` block."""
    from transformers import set_seed

    from ssdtune.peft import announce, attach, lora_config

    base: Any = open_model(config)
    try:
        for line in base.ssdtune.engine.plan.lines():
            say(line)
        if trains_all(config):
            say("training  all weights, by forward passes alone; their files stay as they are")
            yield base
            return
        set_seed(args.seed)  # of the adapter's first values
        model = attach(base, lora_config(config, base))
        for line in announce(model):
            say(line)
        if config.init_lora_weights == "loftq" and start.resume_from is None:
            _begin_at_residual(config, args, model, say)
        yield model
    finally:
        base.ssdtune.close()


def _begin_at_residual(config: TrainConfig, args: SSDConfig, model: Any, say: Say) -> None:
    """LoftQ's first values of the adapter, the same in every process."""
    from ssdtune.peft import replace_lora_weights_loftq

    say(replace_lora_weights_loftq(model, config.loftq_source).line())
    if args.world_size > 1:
        from accelerate.utils import broadcast

        # Libraries of linear algebra round as threads and addresses have it.
        broadcast([p.data for p in model.parameters() if p.requires_grad], from_process=0)


def trains_all(config: TrainConfig) -> bool:
    """Whether all weights train, not an adapter."""
    return config.method == "zo" and config.zo_trains != "adapters"


def open_model(config: TrainConfig) -> Any:
    """`ssdtune.stream` with a configuration's keys; no adapter. Raises SSDTuneError."""
    from ssdtune.api import stream, stream_arguments

    return stream(config.model_name_or_path, **stream_arguments(_with_folder(config)))


def _with_folder(config: TrainConfig) -> TrainConfig:
    """Block inputs and activations on NVMe lie in output_dir where no folder was given."""
    offload = config.offload
    is_used = offload.block_inputs == "nvme" or offload.nvme_activations
    if not is_used or offload.path is not None:
        return config
    offload = dataclasses.replace(offload, path=config.output_dir)
    return dataclasses.replace(config, offload=offload)


def _check_sizes(config: TrainConfig, model: Any, rows: Rows, say: Say) -> None:
    """Ids that the embedding lacks are an error; rows beyond the trained positions are said."""
    import pyarrow.compute as pc

    num_ids = model.get_input_embeddings().weight.shape[0]
    column = rows.train.dataset.data.column("input_ids")
    largest = pc.max(pc.list_flatten(column)).as_py()  # type: ignore[attr-defined]
    if largest is not None and largest >= num_ids:
        raise RunError(
            f"model_name_or_path: the tokenizer gives id {largest:,}, the model has embeddings for "
            f"{num_ids:,}.\nTokenizer and model don't belong together."
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = rows.train.stats.longest_row
    if positions and longest > positions:
        say(
            f"note: rows of up to {longest:,} tokens, the model was made for {positions:,}: "
            f"set max_length to {positions} at most"
        )


# ------------------------------------------------------------------ training


def _train(
    config: TrainConfig, args: SSDConfig, rows: Rows, model: Any, *, start: Start, say: Say
) -> TrainResult:
    _check_sizes(config, model, rows, say)
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
    metrics = {**output.metrics, "predicted_peak_bytes": peak.ram_bytes}
    if watch is not None:
        metrics["predicted_and_measured"] = watch.compared()
    result = _result(config, trainer, telemetry, metrics)
    if args.process_index == 0:
        _write_trace(config.output_dir, result, None if watch is None else watch.schedule)
    if result.was_interrupted:
        folder, seconds = trainer.checkpoints.last_saved or (config.output_dir, 0.0)
        say(f"saved     {folder} in {seconds:.1f} s. Resume: {_resume_command(config)}")
        return result
    _save_result(config, trainer, rows, result)
    say(f"done      {config.output_dir}   {report.duration(perf_counter() - started)}")
    return result


def _resume_from(config: TrainConfig, args: SSDConfig) -> Any:
    """A checkpoint's folder, True for the newest, or nothing; the same in every process."""
    wanted: Any = config.resume_from_checkpoint
    if wanted != "auto":
        return wanted
    found = newest(config.output_dir) if args.process_index == 0 else None
    return _shared(str(found) if found else None, args)


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
    from ssdtune.trainer.forecast import Rehearsals, forecast, schedule_of
    from ssdtune.trainer.scheduling import Watch
    from ssdtune.trainer.settling import Auto, settle, settle_inputs

    rehearsals, offload = Rehearsals(trainer), config.offload
    longest = rows.train.stats.longest_row
    assert trainer.streamer is not None
    schedule = schedule_of(rehearsals, rows.train.lengths(), depth=offload.prefetch)
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
    if settle(rehearsals, schedule, longest_row=longest, base_bytes=base_bytes, auto=auto):
        for line in trainer.streamer.engine.plan.lines():
            say(line)
    peak = forecast(rehearsals, longest_row=longest, base_bytes=base_bytes, say=say)
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
    from ssdtune.trainer.telemetry import MetricsFile, Progress, Telemetry

    telemetry = Telemetry(model.ssdtune)
    callbacks = [telemetry, Progress(telemetry), MetricsFile(config.output_dir / METRICS_NAME)]
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
    trainer.checkpoints.extra_files[CONFIG_NAME] = to_yaml(config).encode()
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


def _shared(value: str | None, args: SSDConfig) -> str | None:
    """The main process's value, in every process."""
    if args.world_size < 2:
        return value
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values, from_process=0)
    return values[0]


def _job_line(trainer: SSDTrainer, rows: Rows) -> str:
    args = trainer.args
    processes = f" × {args.world_size} processes" if args.world_size > 1 else ""
    num_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_epoch = math.ceil(len(rows.train) / num_rows)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
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


# ------------------------------------------------------------------ what stays


def _result(
    config: TrainConfig, trainer: SSDTrainer, telemetry: Telemetry, metrics: dict[str, Any]
) -> TrainResult:
    from ssdtune.trainer.telemetry import losses_of, summary

    history = trainer.state.log_history
    metrics |= losses_of(history)
    metrics |= summary(telemetry.records)
    metrics["global_step"] = trainer.state.global_step
    metrics["num_trainable"] = trainer.num_trainable()
    # Linux counts in KiB: getrusage(2)
    metrics["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return TrainResult(
        metrics=metrics,
        log_history=list(history),
        trace=list(telemetry.streamer.engine.trace),
        output_dir=config.output_dir,
        was_interrupted=trainer.was_interrupted
        and trainer.state.global_step < trainer.state.max_steps,
    )


def _write_trace(folder: Path, result: TrainResult, schedule: Schedule | None) -> None:
    """What ran, and for `ssdtune trace` the plan of the last steps with what the profile alone says of it."""
    from ssdtune.schedule.compare import Prediction
    from ssdtune.schedule.trace import json_lines

    text = "".join(f"{line}\n" for line in json_lines(result.trace))
    write_file_atomically(folder / TRACE_NAME, text.encode())
    if schedule is not None:
        plan = schedule.streamer.engine.plan
        prediction = Prediction.of(plan, schedule.priced({}).simulation(plan), schedule.passes.kind)
        write_file_atomically(folder / PLAN_NAME, prediction.to_json().encode())


def _save_result(config: TrainConfig, trainer: SSDTrainer, rows: Rows, result: TrainResult) -> None:
    """The adapter, its tokenizer and card into `output_dir`, each file whole or as it was before."""
    from ssdtune.trainer.card import model_card

    if not trainer.args.should_save:
        return
    folder = new_temporary_folder(config.output_dir / "result")
    try:
        trainer.save_model(str(folder), _internal_call=True)
        card = model_card(config, rows.train.stats, result.metrics)
        (folder / "README.md").write_text(card, encoding="utf-8")
        identity = json.dumps(dataclasses.asdict(trainer.identity()), indent=1)
        (folder / IDENTITY_NAME).write_text(identity + "\n")
        (folder / RESULTS_NAME).write_text(json.dumps(result.metrics, indent=1) + "\n")
        files = [p for p in folder.rglob("*") if p.is_file() and p.name != MARKER_NAME]
        # Weights last: where they are new, all that describes them is.
        for path in sorted(files, key=lambda p: (p.suffix == WEIGHTS_SUFFIX, p)):
            target = config.output_dir / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomically(target, path.read_bytes())
    finally:
        remove_folder_we_made(folder)
