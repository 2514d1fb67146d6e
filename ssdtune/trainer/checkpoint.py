"""Checkpoints that are wholly there or not at all, and that know what they belong to.

`checkpoint-N` holds what a Trainer's holds: adapter in peft's format, tokenizer, optimizer,
scheduler, random states, `trainer_state.json`; and `ssdtune.json`: the base's fingerprint, the data,
and what decides which row comes next. It is filled under a temporary name, flushed and renamed
(`ssdtune.durable`), and only then are older ones removed. A run is resumed from the newest whole
one; one of another base or with another order of rows is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import ExportableState

from ssdtune.durable import (
    DurableError,
    commit_folder,
    committed_files,
    new_temporary_folder,
    remove_folder_we_made,
    write_file_atomically,
)
from ssdtune.errors import SSDTuneError
from ssdtune.trainer.adapted import adapter_of
from ssdtune.trainer.together import together

if TYPE_CHECKING:
    from ssdtune.trainer.trainer import SSDTrainer

PREFIX = "checkpoint-"
IDENTITY_NAME = "ssdtune.json"
STATE_NAME = "trainer_state.json"
ARGUMENTS_NAME = "training_args.json"
PICKLED_ARGUMENTS = "training_args.bin"
OPTIMIZER_NAME = "optimizer.pt"
RATES = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
MAX_IDENTITY_BYTES = 1 << 20
DIGEST_ROWS = 64
WAYS_OUT = (
    "Give what the run began with, or another output_dir, or resume_from_checkpoint: false "
    "to start anew."
)


class CheckpointError(SSDTuneError):
    """A checkpoint that is incomplete, or of another run."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What must be the same for a resumed run to go on as if it had never stopped.

    base: fingerprint of the streamed model's files, None for a model in memory. reading: in how many bits its nested
    codes are read, None for other weights. dtype: of the streamed model's weights. adapter: its configuration, None without
    one. needs_gradients: False for method: zo. optim: whose states a checkpoint has, None where there are none. rows_digest:
    of up to 64 rows, None where rows are made on the fly. The rest decides the order of rows and which of them make a step.
    """

    base: str | None
    reading: str | None
    dtype: str | None
    adapter: dict[str, Any] | None
    needs_gradients: bool
    optim: str | None
    num_rows: int | None
    rows_digest: str | None
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    seed: int
    data_seed: int | None

    @staticmethod
    def of(
        trainer: SSDTrainer, *, base: str | None, reading: str | None, dtype: str | None
    ) -> RunIdentity:
        """That of a trainer as it is now."""
        args, rows = trainer.args, trainer.train_dataset
        return RunIdentity(
            base=base,
            reading=reading,
            dtype=dtype,
            adapter=adapter_of(trainer.model),
            needs_gradients=trainer.needs_gradients,
            optim=str(getattr(args.optim, "value", args.optim))
            if trainer.needs_gradients
            else None,
            num_rows=len(rows) if hasattr(rows, "__len__") else None,  # type: ignore[arg-type]
            rows_digest=rows_digest(rows),
            per_device_train_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            num_processes=args.world_size,
            seed=args.seed,
            data_seed=args.data_seed,
        )

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """What is not as in a saved identity, in words; keys that it lacks are not compared."""
        return differences(dataclasses.asdict(self), saved)


def differences(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Where some fields of an identity, `mine`, are not as in a saved one, in words."""
    said = []
    for name, value in mine.items():
        if name not in saved or value == saved[name]:
            continue
        if isinstance(value, Mapping) and isinstance(saved[name], Mapping):
            said += [f"the {name}'s {each}" for each in differences(value, saved[name])]
        else:
            said.append(_told(name, value, saved[name]))
    return said


def _told(name: str, mine: Any, theirs: Any) -> str:
    if name == "base":
        return "the base model's files are not those that the adapter was trained on"
    if name == "reading":
        before = "as stored" if theirs is None else f"in {theirs} bits"
        return f"the base's weights were read {before} and are {'as stored' if mine is None else f'in {mine}'}"
    if name == "adapter":
        return "it trains an adapter" if mine else "it trained an adapter, and this run has none"
    if name == "needs_gradients":
        return f"it was trained {'by gradients' if theirs else 'with method: zo'}"
    if name == "rows_digest":
        return "the training rows are others (or cut or tokenized otherwise)"
    return f"{name} was {theirs} and is {mine}"


class Checkpoints:
    """Saves, finds and prunes the checkpoints of a trainer's `output_dir`.

    extra_files: name -> content, written into each (the resolved configuration, say).
    last_saved: (folder, seconds it took), None before the first.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.extra_files: dict[str, bytes] = {}
        self.last_saved: tuple[Path, float] | None = None

    # ---- saving ------------------------------------------------------------------------------

    def save(self, model: Any, trial: Any = None) -> None:
        """Writes `checkpoint-<step>` of the trainer's state. Raises DurableError, old ones intact; ProcessError where it
        failed in another process."""
        trainer, started = self.trainer, perf_counter()
        run_folder = Path(trainer._get_output_dir(trial=trial))
        final = run_folder / f"{PREFIX}{trainer.state.global_step}"
        if trainer.hp_search_backend is None and trial is None:
            trainer.store_flos()
        folder = self._temporary_of_all(final)
        try:
            self._together(partial(self._fill, folder, final), final)  # all files -> the rename
            self._together(partial(self._commit, folder, final), final)
        except Exception:
            if trainer.args.should_save:
                remove_folder_we_made(folder)
            raise
        self.last_saved = (final, perf_counter() - started)

    def _temporary_of_all(self, final: Path) -> Path:
        """One temporary folder, made by the main process, known to all."""

        def make() -> Path | None:
            return new_temporary_folder(final) if self.trainer.args.should_save else None

        return self._together(make, final)

    def _together(self, act: Callable[[], Any], final: Path) -> Any:
        return together(act, f"save its part of {final}", self.trainer.args.world_size)

    def _commit(self, folder: Path, final: Path) -> None:
        if self.trainer.args.should_save:
            commit_folder(folder, final)
            self._prune(final.parent)

    def _fill(self, folder: Path, final: Path) -> None:
        trainer, args = self.trainer, self.trainer.args
        trainer.save_model(str(folder), _internal_call=True)
        self._note_best(final)
        if not args.save_only_model:
            trainer._save_optimizer_and_scheduler(str(folder))
            trainer._save_scaler(str(folder))
            trainer._save_rng_state(str(folder))
        if args.should_save:
            self._store_callbacks()
            trainer.state.save_to_json(str(folder / STATE_NAME))
            position = {
                "global_step": trainer.state.global_step,
                "epoch": trainer.state.epoch,
            }
            told = {**dataclasses.asdict(trainer.identity()), "position": position}
            (folder / IDENTITY_NAME).write_text(json.dumps(told, indent=1) + "\n")
            for name, content in self.extra_files.items():
                (folder / name).write_bytes(content)

    def _note_best(self, final: Path) -> None:
        """Where the best weights are, as `load_best_model_at_end` and EarlyStopping want to know."""
        state = self.trainer.state
        if not state.best_global_step:
            return
        best = final.parent / f"{PREFIX}{state.best_global_step}"
        if best == final or best.is_dir():
            state.best_model_checkpoint = str(best)

    def _store_callbacks(self) -> None:
        """Each stateful callback's state as it is now, as Trainer stores them."""
        trainer = self.trainer
        stored: dict[str, Any] = trainer.state.stateful_callbacks
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if not isinstance(callback, ExportableState):
                continue
            name = type(callback).__name__
            if isinstance(stored.get(name), list):
                stored[name].append(callback.state())
            else:
                stored[name] = callback.state()

    def replace_pickled_arguments(self, folder: str | Path) -> None:
        """JSON instead of a pickle: whoever loads a checkpoint should not have to run it."""
        folder = Path(folder)
        (folder / PICKLED_ARGUMENTS).unlink(missing_ok=True)
        text = self.trainer.args.to_json_string()
        write_file_atomically(folder / ARGUMENTS_NAME, text.encode())

    def _prune(self, run_folder: Path) -> None:
        """Removes the oldest beyond `save_total_limit`; never the newest, nor the best."""
        limit = self.trainer.args.save_total_limit
        if not limit or limit < 1:
            return
        found = [folder for folder in steps_of(run_folder).values() if is_ours(folder)]
        best = self.trainer.state.best_model_checkpoint
        kept = {found[-1], *(folder for folder in found if best and folder == Path(best))}
        spare = [folder for folder in found if folder not in kept]
        for folder in spare[: max(len(found) - max(limit, len(kept)), 0)]:
            try:
                remove_folder_we_made(folder)
            except DurableError as error:  # somebody put a file there: no reason to stop training
                sys.stderr.write(f"note: {error}\n")

    # ---- resuming ----------------------------------------------------------------------------

    def find(self, wanted: str | bool | None) -> Path | None:
        """The folder to resume from. True: the newest whole one of `output_dir`."""
        if not wanted:
            return None
        if wanted is not True:
            return checked_folder(Path(wanted).expanduser())
        run_folder = Path(self.trainer.args.output_dir)
        found = newest(run_folder)
        if found is None:
            raise CheckpointError(
                f"{run_folder} holds no whole checkpoint to resume from.\n"
                "Start anew with resume_from_checkpoint: auto or false."
            )
        return found

    def check(self, folder: Path, identity: RunIdentity) -> None:
        """Raises CheckpointError if the checkpoint is of another base, data or step."""
        said = identity.differences(read_identity(folder))
        if said:
            raise CheckpointError(f"can't resume from {folder}: {'; '.join(said[:3])}.\n{WAYS_OUT}")

    def kept(self, folder: Path) -> list[str]:
        """What was asked for and stays as it was: an optimizer's state has its own rates, and is taken as it is."""
        arguments = folder / ARGUMENTS_NAME
        if not arguments.is_file() or not (folder / OPTIMIZER_NAME).is_file():
            return []
        before, args = json.loads(arguments.read_bytes()), self.trainer.args
        return [
            f"note: {name} stays {before[name]:g}, and {getattr(args, name):g} is for a run that begins: "
            "resume_from_checkpoint: false"
            for name in RATES
            if name in before and before[name] != getattr(args, name)
        ]


# ------------------------------------------------------------------ folders


def steps_of(run_folder: Path) -> dict[int, Path]:
    """Step -> `checkpoint-<step>` of a run's folder, oldest first, whole or not."""
    numbered = {
        int(number): folder
        for folder in Path(run_folder).glob(f"{PREFIX}*")
        if (number := folder.name.removeprefix(PREFIX)).isdigit() and folder.is_dir()
    }
    return dict(sorted(numbered.items()))


def is_ours(folder: Path) -> bool:
    """Whether the folder was committed by us, whole or damaged since."""
    return committed_files(folder) is not None


def fault_of(folder: Path) -> str | None:
    """What a committed folder lacks of what it held when it was saved; None if it is whole."""
    files = committed_files(folder)
    if files is None:
        return "it has no list of its files: saving was not finished, or another program wrote it"
    for name, num_bytes in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != num_bytes:
            return f"{name} has {path.stat().st_size:,} bytes of {num_bytes:,}"
    return None


def newest(run_folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder. Those passed over are named on stderr."""
    for folder in reversed(steps_of(run_folder).values()):
        fault = fault_of(folder)
        if fault is None:
            return folder
        sys.stderr.write(f"note: {folder} is passed over: {fault}\n")
    return None


def checked_folder(folder: Path) -> Path:
    """A folder that somebody named. One of another Trainer is taken as it is."""
    if not (folder / STATE_NAME).is_file():
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} is no checkpoint ({STATE_NAME} is not there).\n"
            "Give a folder checkpoint-N, or auto for the newest of output_dir."
        )
    if is_ours(folder) and (fault := fault_of(folder)) is not None:
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} is damaged: {fault}.\n"
            "Give an earlier one, or auto for the newest whole one of output_dir."
        )
    return folder


def read_identity(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its run; empty for one of another Trainer."""
    path = folder / IDENTITY_NAME
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(MAX_IDENTITY_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}.\n{WAYS_OUT}") from error
    return told if isinstance(told, dict) else {}


# ------------------------------------------------------------------ what a run is made of


def rows_digest(rows: Any) -> str | None:
    """Digest of up to 64 rows' `input_ids`, spread evenly; None where rows can't be asked twice."""
    columns = getattr(rows, "column_names", None)
    if not isinstance(columns, list) or "input_ids" not in columns or not hasattr(rows, "__len__"):
        return None
    digest, num_rows = hashlib.sha256(), len(rows)
    for row_idx in sorted({k * num_rows // DIGEST_ROWS for k in range(DIGEST_ROWS)}):
        if row_idx < num_rows:
            digest.update(json.dumps([int(i) for i in rows[row_idx]["input_ids"]]).encode())
    return digest.hexdigest()
