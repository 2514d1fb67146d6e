"""`stream()`: what a notebook user calls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.config import Offload

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

AUTO_RAM_SHARE = 0.5  # of what is free: the rest is for activations, adapters and whatever else runs
AUTO_VRAM_SHARE = 0.6
DEFAULT_PREFETCH = 2  # fills ahead: with fewer a step waits for the drive, more gain nothing
DEFAULT_CHUNK_TOKENS = 4096


def stream(
    model_name_or_path: str | os.PathLike[str],
    *,
    offload: Offload | dict[str, Any] | None = None,
    micro_batch_size: int | None = None,
    dtype: str | torch.dtype = "auto",
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """The ordinary Hugging Face model, its blocks streamed from its own safetensors files.

    The full weights are never in memory, at load either. Base weights are frozen; adapters from
    `peft.get_peft_model` train as usual, under any loop that calls `model(**batch)`.

    Args:
        model_name_or_path: a folder with safetensors files, or a hub id.
        offload: budgets and paths: a dict or `ssdtune.Offload`; sizes as "300MB", "1.5GiB", bytes or "auto".
            `ram` and `vram` bound what the streamed weights and their buffers may fill.
        micro_batch_size: rows that pass a block at once. A larger batch is cut into groups of so many, and all of
            them pass each block before it leaves. None: batches are not cut.
        dtype: "auto" (the checkpoint's), or a torch dtype or its name.
        from_pretrained_kwargs: `revision`, `trust_remote_code`, `attn_implementation`, … as in `from_pretrained`;
            what is not honoured is refused by name.

    Raises:
        SSDTuneError: a file, key, budget or argument is wrong; the message says which and what to do.
    """
    from ssdtune.visit.assemble import assemble
    from ssdtune.visit.build import build_meta

    chosen = Offload.of(offload)
    meta = build_meta(model_name_or_path, dtype=dtype, **from_pretrained_kwargs)
    return assemble(meta, options_for(chosen, meta.folder, micro_batch_size))


def options_for(offload: Offload, folder: Path, micro_batch_size: int | None) -> Any:
    """`assemble.Options` on this machine: every `auto` replaced by what is free here."""
    import torch

    from ssdtune.schedule.plan import Budgets, Tier
    from ssdtune.visit.assemble import Options

    has_device = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_device else torch.device("cpu")
    vram = 0
    if has_device:
        vram = offload.vram or int(torch.cuda.mem_get_info(device)[0] * AUTO_VRAM_SHARE)
    inputs = Tier.DEVICE if offload.block_inputs == "auto" else Tier(offload.block_inputs)
    if not has_device and inputs is Tier.RAM:
        inputs = Tier.DEVICE  # the same memory
    return Options(
        device=device,
        budgets=Budgets(ram_bytes=offload.ram or int(free_ram() * AUTO_RAM_SHARE), device_bytes=vram),
        storage=choose(offload.storage, folder),
        prefetch=DEFAULT_PREFETCH if offload.prefetch is None else offload.prefetch,
        reader_threads=offload.reader_threads,
        micro_batch_size=micro_batch_size,
        chunk_tokens=offload.loss_chunk_tokens or DEFAULT_CHUNK_TOKENS,
        block_inputs=inputs,
        scratch=offload.path,
    )


def choose(wanted: str, folder: Path) -> Any:
    """The storage that reads `folder`, as asked for or as a probe finds best."""
    from ssdtune.swap.storage import BufferedStorage, choose_storage

    return BufferedStorage() if wanted == "buffered" else choose_storage(folder).storage


def free_ram() -> int:
    """Bytes of RAM that the kernel would give now without swapping, within the cgroup's limit where there is one."""
    with open("/proc/meminfo") as meminfo:
        fields = dict(line.split(":", 1) for line in meminfo)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        folder = Path("/sys/fs/cgroup")
        try:
            bound = (folder / limit).read_text().strip()
            if bound != "max":
                free = min(free, int(bound) - int((folder / used).read_text()))
        except (OSError, ValueError):
            continue
    return max(free, 0)
