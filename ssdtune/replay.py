"""`ssdtune replay`: what a zeroth-order run trained, as it was after any step, made again from the base and the run's log.

The base is streamed, each block takes the steps of the log, and is written as it leaves (`visit/saving.py`). An adapter
begins with the values that its seed stands for, takes the steps in memory, and is written as peft does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.durable import commit_folder, new_temporary_folder, remove_folder_we_made
from ssdtune.errors import SSDTuneError
from ssdtune.generate import config_of, find_result
from ssdtune.peft import fingerprint_of, replace_lora_weights_loftq
from ssdtune.peft.loftq import LOFTQ
from ssdtune.report import hush_libraries, say
from ssdtune.run_files import LOG_NAME
from ssdtune.sizes import format_size
from ssdtune.trainer.opening import attached, open_model
from ssdtune.visit.saving import check_is_new, not_written, unstreamed_state, write_weights
from ssdtune.zeroth_order.log import ADAPTERS, Log, read_log
from ssdtune.zeroth_order.method import check_weights, replayed, that_train

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig


class ReplayError(SSDTuneError):
    """A run without a log, or whose adapter begins elsewhere."""


def replay_run(run: Path, out: Path, *, step: int | None = None) -> int:
    """Writes the weights, or the adapter, after `step` steps, all by default, to the new folder `out`. Raises
    SSDTuneError."""
    from transformers.utils import logging

    from ssdtune.config import load_config

    logging.set_verbosity_error()
    hush_libraries()
    check_is_new(out)
    folder = find_log(run)
    path = folder / LOG_NAME
    log = _read(path)
    num_steps = log.num_steps if step is None else step
    if not 0 <= num_steps <= log.num_steps:
        raise ReplayError(f"{path} has {log.num_steps} steps.\nGive --step 0 to {log.num_steps}.")
    config = load_config(config_of(run, folder), []).config
    base: Any = open_model(config)
    try:
        check_weights(log.header, base, where=str(path))
        is_adapter = log.header.trains == ADAPTERS
        model = first_adapter(config, base, log, path) if is_adapter else base
        replayed(model, log, num_steps=num_steps)
        num_bytes = (write_adapter if is_adapter else write_weights)(model, out)
    finally:
        base.ssdtune.close()
    what = "adapter" if is_adapter else "weights"
    say(
        f"written   {out}: the {what} after {num_steps} of {log.num_steps} steps, {format_size(num_bytes)}"
    )
    return 0


def find_log(run: Path) -> Path:
    """The folder with the run's log: its own, else its newest checkpoint."""
    found = find_result(run, LOG_NAME)
    if found is None or not (found / LOG_NAME).is_file():
        raise ReplayError(
            f"{run} holds no {LOG_NAME}.\nGive the output_dir of a run with method: zo."
        )
    return found


def first_adapter(config: TrainConfig, base: Any, log: Log, path: Path) -> Any:
    """The base with the adapter that the run began with. Raises ReplayError where it can't be made again."""
    model = attached(config, base, seed=log.header.seed)
    if config.init_lora_weights == LOFTQ:
        replace_lora_weights_loftq(model, config.loftq_source)
    if fingerprint_of(that_train(model)) != log.header.adapter:
        raise ReplayError(
            f"{path}: the adapter that the run began with can't be made again: another version of torch or peft, other "
            "lora_* keys, or first values that a library of linear algebra computes.\n"
            "Take the adapter of one of the run's checkpoints."
        )
    return model


def _read(path: Path) -> Log:
    log = read_log(path.read_bytes(), str(path))
    if log.is_cut:
        say(f"note: {path}: its last line was cut off; that step did not happen")
    return log


# ------------------------------------------------------------------ writing


def write_adapter(model: Any, out: Path) -> int:
    """Writes a peft model's adapter to the new folder `out`; bytes of its values. Raises SSDTuneError where that fails,
    and leaves nothing."""
    from safetensors import SafetensorError

    folder = new_temporary_folder(out)
    try:
        model.save_pretrained(str(folder), state_dict=unstreamed_state(model))
        commit_folder(folder, out)
    except (OSError, SafetensorError) as error:
        raise not_written(out, error) from error
    finally:
        remove_folder_we_made(folder)
    return sum(p.nbytes for p in that_train(model).values())
