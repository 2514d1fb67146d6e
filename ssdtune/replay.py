"""`ssdtune replay`: weights of any step of a zeroth-order run, made again from the base and the run's log.

The base is streamed, each block takes the steps of the log, and is written as it leaves: memory for one block at a
time, whatever the model's size. The folder is one that `from_pretrained` reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssdtune.durable import (
    commit_folder,
    new_temporary_folder,
    remove_folder_we_made,
    write_file_atomically,
)
from ssdtune.errors import SSDTuneError
from ssdtune.generate import config_of, find_result
from ssdtune.report import say
from ssdtune.run_files import LOG_NAME
from ssdtune.sizes import format_size
from ssdtune.swap.beside import CONFIG, copy_beside
from ssdtune.trainer.checkpoint import base_of
from ssdtune.trainer.opening import open_model
from ssdtune.zeroth_order.log import ADAPTERS, Log, read_log
from ssdtune.zeroth_order.method import replayed

INDEX_NAME = "model.safetensors.index.json"


class ReplayError(SSDTuneError):
    """A run without a log of all weights, or of another base."""


def replay_run(run: Path, out: Path, *, step: int | None = None) -> int:
    """Writes the weights after `step` steps, all by default, to the new folder `out`. Raises SSDTuneError."""
    from transformers.utils import logging

    from ssdtune.config import load_config

    logging.set_verbosity_error()
    if out.exists():
        raise ReplayError(f"{out} is there already.\nGive a folder that is not.")
    folder = find_log(run)
    path = folder / LOG_NAME
    log = _log_of_all(path)
    num_steps = log.num_steps if step is None else step
    if not 0 <= num_steps <= log.num_steps:
        raise ReplayError(f"{path} has {log.num_steps} steps.\nGive --step 0 to {log.num_steps}.")
    model: Any = open_model(load_config(config_of(run, folder), []).config)
    try:
        check_base(log, base_of(model), path)
        replayed(model, log, num_steps=num_steps)
        num_bytes = write_weights(model, out)
    finally:
        model.ssdtune.close()
    say(
        f"written   {out}: the weights after {num_steps} of {log.num_steps} steps, {format_size(num_bytes)}"
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


def check_base(log: Log, base: str, path: Path) -> None:
    """Raises ReplayError where the log belongs to other files."""
    if log.header.base not in (None, base):
        raise ReplayError(
            f"{path} was written over other weights than those of this base model.\n"
            "Give the right one: model_name_or_path in the run's configuration."
        )


def _log_of_all(path: Path) -> Log:
    log = read_log(path.read_bytes(), str(path))
    if log.is_cut:
        say(f"note: {path}: its last line was cut off; that step did not happen")
    if log.header.trains == ADAPTERS:
        raise ReplayError(
            f"{path} is the log of an adapter, which is saved beside it.\nLoad it with peft."
        )
    return log


# ------------------------------------------------------------------ writing


def write_weights(model: Any, out: Path) -> int:
    """Writes a streamed model as it is now to the new folder `out`, a file for each block; bytes of all weights. Raises
    SSDTuneError where that fails, and leaves nothing."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    parts = list(_parts(model))
    folder = new_temporary_folder(out)
    try:
        places: dict[str, str] = {}
        total = 0
        for number, names in enumerate(parts, 1):
            tensors = _in_files_form(model, names)
            name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            try:
                save_file(tensors, folder / name, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                raise ReplayError(
                    f"{out} could not be written: {error}.\n"
                    "Nothing of it stays. Free some space, or give --out on another drive."
                ) from error
            places |= dict.fromkeys(tensors, name)
            total += sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_file_atomically(folder / INDEX_NAME, (json.dumps(index, indent=1) + "\n").encode())
        _write_the_rest(model, folder)
        commit_folder(folder, out)
    finally:
        remove_folder_we_made(folder)
    return total


def _parts(model: Any) -> Iterator[list[str]]:
    """Names of weights that are written together: a block's, and those outside of blocks."""
    streamer = model.ssdtune
    streamed: set[str] = set()
    for block in range(len(streamer.blocks)):
        names = streamer.names(block)
        streamed.update(names)
        yield names
    held = {id(w.placeholder) for w in streamer.weights}
    outside = [name for name, p in model.named_parameters() if id(p) not in held]
    state = model.state_dict(keep_vars=True)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    outside += [name for name in state if name not in parameters]  # persistent buffers
    if outside:
        yield outside


def _in_files_form(model: Any, names: list[str]) -> dict[str, Any]:
    """Values under the names, and in the shapes, that the hub's files have."""
    from transformers.core_model_loading import revert_weight_conversion

    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    values = {name: state[name].detach().clone().cpu() for name in names}
    return {name: t.contiguous() for name, t in revert_weight_conversion(model, values).items()}


def _write_the_rest(model: Any, folder: Path) -> None:
    """Config, generation config, tokenizer: whatever lies beside the base's weights. A GGUF file has its config in
    itself, which the model has by now."""
    copy_beside(model.ssdtune.checkpoint.folder, folder)
    if not (folder / CONFIG).is_file():
        model.config.save_pretrained(folder)
