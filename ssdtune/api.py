"""`stream()`: what a notebook user calls, and `plan()`: what it would do."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.config import Offload
from ssdtune.errors import SSDTuneError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ssdtune.config import TrainConfig
    from ssdtune.schedule.plan import Plan, Tier
    from ssdtune.swap.gds import GdsPool
    from ssdtune.swap.storage import Storage, StorageChoice
    from ssdtune.visit.build import MetaModel
    from ssdtune.visit.draft import Draft, Options

AUTO_RAM_SHARE = (
    0.5  # of what is free: the rest is for activations, adapters and whatever else runs
)
AUTO_VRAM_SHARE = 0.6
DEFAULT_PREFETCH = 2  # fills ahead: with fewer a step waits for the drive, more gain nothing
DEFAULT_CHUNK_TOKENS = 4096


class OffloadError(SSDTuneError):
    """What `offload` asks for is not to be had on this machine."""


def stream(
    model_name_or_path: str | os.PathLike[str],
    *,
    offload: Offload | dict[str, Any] | None = None,
    micro_batch_size: int | None = None,
    dtype: str | torch.dtype = "auto",
    quantization: str | int = "none",
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """The ordinary Hugging Face model, its blocks streamed from its own safetensors files.

    The full weights are never in memory, at load either. Base weights are frozen; adapters from
    `peft.get_peft_model` train as usual, under any loop that calls `model(**batch)`. The first time
    a model type is streamed, a small random copy of it is trained both ways and compared (seconds).

    Args:
        model_name_or_path: a folder with safetensors files, or a hub id.
        offload: budgets and paths: a dict or `ssdtune.Offload`; sizes as "300MB", "1.5GiB", bytes
            or "auto". `ram` and `vram` bound what the streamed weights and their buffers may fill.
        micro_batch_size: rows that pass a block at once. A larger batch is cut into groups of so
            many, and all of them pass each block before it leaves. None: batches are not cut.
        dtype: "auto" (the checkpoint's), or a torch dtype or its name.
        quantization: "none": the weights as the files have them. 1 to 8, "nf4", "mxfp4", …: in so many bits; "4/8": 4
            bits read of a nested file of 8. A model that `ssdtune pack` wrote is read at that width; another is packed
            once, into `offload.path` or the cache.
        from_pretrained_kwargs: `revision`, `trust_remote_code`, `attn_implementation`, … as in
            `from_pretrained`; what is not honoured is refused by name.

    Raises:
        SSDTuneError: a file, key, budget or argument is wrong, or the architecture can't be
            streamed; the message says which and what to do.
    """
    chosen = Offload.of(offload)
    return streamed(
        model_name_or_path,
        chosen,
        scratch=chosen.path,
        micro_batch_size=micro_batch_size,
        dtype=dtype,
        quantization=quantization,
        **from_pretrained_kwargs,
    )


def streamed(
    model_name_or_path: str | os.PathLike[str],
    offload: Offload,
    *,
    scratch: Path | None,
    micro_batch_size: int | None = None,
    dtype: str | torch.dtype = "auto",
    quantization: str | int = "none",
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """`stream`, where what a run writes for itself, `scratch`, may lie elsewhere than packed models do."""
    from ssdtune.cache import cache_folder
    from ssdtune.packing.once import build_packed
    from ssdtune.visit.assemble import assemble
    from ssdtune.visit.check import ensure_checked
    from ssdtune.visit.libraries import bound_caches

    bound_caches()
    _check_is_no_runs(offload)
    micro_batch_size = _rows_at_once(offload, micro_batch_size)
    meta = build_packed(
        model_name_or_path,
        quantization=str(quantization),
        beside=offload.path,
        choose_storage=partial(choose, offload.storage),
        dtype=dtype,
        **from_pretrained_kwargs,
    )
    options = _options(meta, dataclasses.replace(offload, path=scratch), micro_batch_size)
    model_class = type(meta.model)  # assemble() puts a class of its own over it
    model = assemble(
        meta, options
    )  # first: files and budgets are checked sooner than architectures
    try:
        ensure_checked(
            model_class,
            meta.config,
            allow_unchecked=offload.allow_unchecked,
            findings=cache_folder() / "checked",
            say=_say,
        )
    except BaseException:
        model.ssdtune.close()  # type: ignore[union-attr]
        raise
    return model


@dataclasses.dataclass(frozen=True)
class Planned:
    """What `stream` would do: the model without weights, the options, its blocks, the plan of a step."""

    meta: MetaModel
    options: Options
    draft: Draft
    plan: Plan


def plan(
    model_name_or_path: str | os.PathLike[str],
    *,
    offload: Offload | dict[str, Any] | None = None,
    micro_batch_size: int | None = None,
    dtype: str | torch.dtype = "auto",
    quantization: str | int = "none",
    **from_pretrained_kwargs: Any,
) -> Planned:
    """The plan with which `stream` of the same arguments would begin. No weights are read.

    Raises SSDTuneError as `stream` does, for a budget that is too small above all; architectures
    are not checked.
    """
    from ssdtune.packing.once import build_planned
    from ssdtune.visit.draft import draft

    meta = build_planned(
        model_name_or_path, quantization=str(quantization), dtype=dtype, **from_pretrained_kwargs
    )
    chosen = Offload.of(offload)
    _check_is_no_runs(chosen)
    options = _options(meta, chosen, _rows_at_once(chosen, micro_batch_size))
    drafted = draft(meta, options)
    return Planned(meta, options, drafted, drafted.replanner.plan())


def _check_is_no_runs(offload: Offload) -> None:
    """Raises OffloadError for what only a run with so many steps can keep."""
    if offload.max_writes is not None:
        raise OffloadError(
            "offload.max_writes is of a whole run, whose steps only `ssdtune train` knows.\n"
            "Leave it out, and offload.block_inputs and offload.nvme_activations off the drive: then nothing is written."
        )


def _rows_at_once(offload: Offload, micro_batch_size: int | None) -> int | None:
    """Raises OffloadError for what only a run with rows and a machine to predict for can decide."""
    wanted = offload.micro_batch_size
    if wanted == "auto" and micro_batch_size is None:
        raise OffloadError(
            "offload.micro_batch_size: auto needs to know a step's rows, which `ssdtune train` does.\n"
            "Write a number, or leave it out: batches are then not cut."
        )
    if micro_batch_size is not None and micro_batch_size < 1:
        raise OffloadError(
            f"micro_batch_size: got {micro_batch_size}.\n"
            "Give 1 row or more, or leave it out: batches are then not cut."
        )
    return wanted if isinstance(wanted, int) and micro_batch_size is None else micro_batch_size


def stream_arguments(config: TrainConfig) -> dict[str, Any]:
    """The keywords of `stream` and `plan` that a configuration stands for."""
    return {
        # What a run may write is kept by the run.
        "offload": dataclasses.replace(config.offload, max_writes=None),
        "micro_batch_size": config.per_device_train_batch_size,
        **build_arguments(config),
    }


def build_arguments(config: TrainConfig) -> dict[str, Any]:
    """Those of them that say which model is built, and how."""
    arguments: dict[str, Any] = {
        "dtype": config.dtype,
        "revision": config.model_revision,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.quantization != "none":
        arguments["quantization"] = config.quantization
    if config.attn_implementation != "auto":
        arguments["attn_implementation"] = config.attn_implementation
    return arguments


def _options(meta: MetaModel, offload: Offload, micro_batch_size: int | None) -> Options:
    options = options_for(offload, meta.checkpoint.files, micro_batch_size)
    if offload.storage == "auto" and options.open_device_pool is not None:
        options = _without_large_buffers(meta, options)
    return options


def _without_large_buffers(meta: MetaModel, options: Options) -> Options:
    """The options with buffers in RAM where the device's budget holds no slot and buffer: what nobody asked for must
    not make the budget too small."""
    from ssdtune.visit.draft import smallest_budgets

    if smallest_budgets(meta, options).device_bytes <= options.budgets.device_bytes:
        return options
    _say("note: offload.vram holds no buffers beside the slots: cuFile is not used after all")
    return dataclasses.replace(options, open_device_pool=None)


def options_for(
    offload: Offload, files: Sequence[Path], micro_batch_size: int | None = None
) -> Options:
    """`draft.Options` on this machine: every `auto` replaced by what is free or found here.

    files: the model's safetensors files. Raises OffloadError for a storage that is not to be had.
    """
    import torch

    from ssdtune.memory import free_ram, processes_here
    from ssdtune.schedule.plan import Budgets
    from ssdtune.visit.draft import Options

    device, vram = torch.device("cpu"), 0
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        vram = offload.vram or int(torch.cuda.mem_get_info(device)[0] * AUTO_VRAM_SHARE)
    elif offload.vram is not None:
        _say("note: offload.vram has no effect: there is no CUDA device here")
    open_device_pool = choose_device_pool(offload.storage, files, device)
    return Options(
        device=device,
        budgets=Budgets(
            ram_bytes=offload.ram or int(free_ram() // processes_here() * AUTO_RAM_SHARE),
            device_bytes=vram,
            activation_bytes=offload.activations or 0,
            nvme_activation_bytes=offload.nvme_activations or 0,
        ),
        storage=choose("gds" if open_device_pool is not None else offload.storage, files),
        prefetch=DEFAULT_PREFETCH if offload.prefetch is None else offload.prefetch,
        reader_threads=offload.reader_threads,
        micro_batch_size=micro_batch_size,
        chunk_tokens=offload.loss_chunk_tokens or DEFAULT_CHUNK_TOKENS,
        block_inputs=_input_tier(offload.block_inputs, device),
        scratch=offload.path,
        open_device_pool=open_device_pool,
    )


def _input_tier(wanted: str, device: torch.device) -> Tier:
    from ssdtune.schedule.plan import Tier

    tier = Tier.DEVICE if wanted == "auto" else Tier(wanted)
    return Tier.DEVICE if tier is Tier.RAM and device.type == "cpu" else tier  # the same memory


# ------------------------------------------------------------------ storage


def choose(wanted: str, files: Sequence[Path]) -> Storage:
    """The storage that reads a model's files: as asked for, or the best that a probe finds.

    "auto" falls back on the page cache with one printed line that says why; "gds": the best, without
    a word, for the little that does not go to the device. Raises OffloadError.
    """
    from ssdtune.swap.storage import BufferedStorage, choose_storage

    if wanted == "buffered":
        return BufferedStorage()
    largest = max(files, key=lambda file: file.stat().st_size)
    choice = choose_storage(largest)
    if not choice.is_direct and wanted != "gds":
        _complain(wanted, choice, largest)
    return choice.storage


def _complain(wanted: str, choice: StorageChoice, file: Path) -> None:
    if wanted == "direct":
        raise OffloadError(
            f"offload.storage: direct I/O is not to be had for {file}: {choice.reason}.\n"
            "Move the model to a drive that has it, or set offload.storage: buffered."
        )
    _say(
        f"warning: {file.parent} is read through the page cache, since {choice.reason}: slower, "
        "and the CPU copies every byte"
    )


def choose_device_pool(
    wanted: str, files: Sequence[Path], device: torch.device
) -> Callable[[], GdsPool] | None:
    """What opens the pool that reads a model's files straight into the device's memory; None: RAM is read into.

    "auto" has it where a self-test finds it right and faster, and says so in one line; without a CUDA device nothing is
    tried. Raises OffloadError where "gds" is not to be had.
    """
    if wanted != "gds" and (wanted != "auto" or device.type != "cuda"):
        return None
    from ssdtune.swap import gds

    choice = gds.choose_gds(max(files, key=lambda file: file.stat().st_size), device=str(device))
    if choice.open_pool is None and wanted == "gds":
        raise OffloadError(
            f"offload.storage: gds is not to be had here: {choice.reason}.\n"
            "Set offload.storage: auto."
        )
    if choice.open_pool is not None and wanted == "auto":
        _say(f"note: files are read straight into the device's memory ({choice.reason})")
    return choice.open_pool


def _say(line: str) -> None:
    """Of several processes one speaks."""
    from ssdtune.report import say

    if os.environ.get("RANK", "0") == "0":
        say(line)
