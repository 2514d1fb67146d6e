"""From a configuration to a `Job`: the model's config and headers, its adapters, its rows; weights are not read.

A job is kept in the cache under a hash of all that it depends on, so that the next `ssdtune plan` of the same files
needs neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssdtune.cache import cache_folder
from ssdtune.durable import write_file_atomically
from ssdtune.errors import SSDTuneError
from ssdtune.schedule.job import Job, job_from

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.opened.source import Opened

FORMAT = 17  # of jobs in the cache; one more when their making changes
KEPT_JOBS = 200
AUTO = "auto"  # of `quantization`
# Keys that change blocks, work or rows.
MODEL_KEYS = (
    "model_name_or_path model_revision trust_remote_code dtype quantization attn_implementation lora_r lora_alpha "
    "bf16 fp16 lora_dropout lora_target_modules lora_modules_to_save init_lora_weights use_dora use_rslora "
    "per_device_train_batch_size gradient_accumulation_steps max_length overlong train_on chat_template "
    "num_train_epochs max_steps optim method zo_trains zo_estimator zo_num_directions zo_rank zo_window zo_update "
    "zo_horizon zo_fold_steps zo_master zo_packed"
).split()


def opens_directions(config: TrainConfig) -> bool:
    """Whether the number of random directions is left open, and more of them are the same method: MeZO's and LOZO's is
    1."""
    is_fzoo = config.method == "zo" and config.zo_estimator == "fzoo"
    return is_fzoo and config.zo_num_directions is None


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


class Jobs:
    """The jobs of a source, its micro-batch cut one way or another. From the cache where nothing that they depend on
    has changed; the model is opened once, when the first is not there."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._opened: Opened | None = None

    def __call__(self, rows_at_once: int | None = None) -> Job:
        """With so many rows in a micro-batch and as many rows in a step as ever; None: as configured.

        rows_at_once: divides the configuration's `step_rows`. Raises SSDTuneError as training would.
        """
        source = self.source
        if rows_at_once is not None:
            config = dataclasses.replace(
                source.config,
                per_device_train_batch_size=rows_at_once,
                gradient_accumulation_steps=source.config.step_rows // rows_at_once,
            )
            source = dataclasses.replace(source, config=config)
        key = _key(source)
        path = None if key is None else cache_folder() / "jobs" / f"{key}.json"
        if path is not None and path.is_file():
            try:
                return _as_it_is_now(job_from(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)  # cut short, or another version's: made anew
        from ssdtune.opened.job import job_from_opened
        from ssdtune.opened.source import open_source

        if self._opened is None:
            self._opened = open_source(source)
        job = job_from_opened(source, self._opened)
        if path is not None:
            _keep(job, path)
        return _as_it_is_now(job)


def _as_it_is_now(job: Job) -> Job:
    """Nothing is to be packed that was packed since."""
    if job.packed_bytes and (Path(job.packed_folder) / "config.json").is_file():
        return dataclasses.replace(job, packed_bytes=0)
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
    told |= {"on_device": source.on_device, "has_data": source.has_data, "path": offload.path}
    text = json.dumps([FORMAT, __version__, told, source.name, states], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _states(paths: Iterator[Path] | Sequence[Path]) -> Iterator[str]:
    for path in paths:
        state = os.stat(path)
        yield f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"


def _keep(job: Job, path: Path) -> None:
    """For the next time. Where it can't be written it is made again, and what another process has removed is gone."""
    with contextlib.suppress(OSError, SSDTuneError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file_atomically(path, job.to_json().encode())
        _forget_old(path.parent)


def _forget_old(folder: Path) -> None:
    jobs = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in jobs[:-KEPT_JOBS]:
        path.unlink(missing_ok=True)
