"""What a run leaves behind: its numbers, its trace, the adapter with all that describes it."""

from __future__ import annotations

import dataclasses
import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.durable import (
    MARKER_NAME,
    new_temporary_folder,
    remove_folder_we_made,
    write_file_atomically,
)
from ssdtune.run_files import PLAN_NAME, RESULTS_NAME, TRACE_NAME
from ssdtune.trainer.checkpoint import IDENTITY_NAME

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.schedule.trace import TraceOp
    from ssdtune.trainer.rows import Rows
    from ssdtune.trainer.scheduling import Schedule
    from ssdtune.trainer.telemetry import Telemetry
    from ssdtune.trainer.trainer import SSDTrainer

WEIGHTS_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    metrics: numbers of the whole run (losses, seconds, bytes; see summary.py). log_history:
    as TrainerState keeps it. trace: ops of the last few steps; steps: numbers of those that trained.
    was_interrupted: stopped by a signal, saved; the same command again goes on.
    """

    metrics: dict[str, Any]
    log_history: list[dict[str, Any]]
    trace: list[TraceOp]
    output_dir: Path
    steps: tuple[int, ...] = ()
    was_interrupted: bool = False


def result_of(
    config: TrainConfig, trainer: SSDTrainer, telemetry: Telemetry, metrics: dict[str, Any]
) -> TrainResult:
    """What the trainer has come to. metrics: of its own; the rest is added to them."""
    from ssdtune.trainer.summary import losses_of, summary

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
        steps=tuple(telemetry.engine_steps),
        was_interrupted=trainer.was_interrupted,
    )


def write_trace(folder: Path, result: TrainResult, schedule: Schedule | None) -> None:
    """What ran, and for `ssdtune trace` the plan of the last steps with what the profile alone says of it."""
    from ssdtune.schedule.compare import Prediction
    from ssdtune.schedule.trace import json_lines

    text = "".join(f"{line}\n" for line in json_lines(result.trace))
    write_file_atomically(folder / TRACE_NAME, text.encode())
    if schedule is not None:
        plan = schedule.streamer.engine.plan
        simulation, kind = schedule.priced({}).simulation(plan), schedule.passes.kind
        prediction = Prediction.of(plan, simulation, kind, result.steps)
        write_file_atomically(folder / PLAN_NAME, prediction.to_json().encode())


def save_result(config: TrainConfig, trainer: SSDTrainer, rows: Rows, result: TrainResult) -> None:
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
