"""Keys under `offload`: where the weights and what is kept for backward may lie, and how it gets there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssdtune.settings import (
    OneOf,
    Or,
    Size,
    Text,
    Whole,
    WordOr,
    YesNo,
    key,
    read_again,
    read_record,
)
from ssdtune.strict_yaml import ConfigError, Node, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """Where the weights and what is kept for backward may lie. None means auto. Sizes in bytes."""

    path: Path | None = key(  # noqa: RUF009 - key() makes a dataclass field
        Or("auto", Text("a folder on a fast drive", is_folder=True)),
        "folder for what ssdtune itself writes: block inputs and activations on NVMe, working copies, packed models; auto: "
        "in output_dir, packed models in the cache",
        default=None,
        example="/nvme/ssdtune",
    )
    vram: int | None = key(
        Size(),
        "most device memory for weights and their buffers; what compute takes beside them `ssdtune plan` tells; auto: "
        "what is free",
        default=None,
        example="7GB",
    )
    ram: int | None = key(
        Size(),
        "most RAM for weights and their buffers; auto: what is free",
        default=None,
        example="300MB",
    )
    prefetch: int | None = key(
        Or("auto", Whole(0, 64)),
        "how many blocks are fetched ahead of compute; 0 fetches each when it is needed",
        default=None,
        example="2",
    )
    block_inputs: str = key(
        OneOf(("auto", "device", "ram", "nvme")),
        "where the inputs of blocks wait for backward; auto: what fits and is predicted to be the fastest, said before "
        "the first step",
        default="auto",
    )
    micro_batch_size: str | int | None = key(
        Or("none", WordOr("auto", Whole(1, 2**24))),
        "rows that pass a block at once, where that is to be another cut of the same step than "
        "per_device_train_batch_size; auto: what fits and is predicted to be the fastest of all that divide the step's "
        "rows",
        default=None,
        example="auto",
    )
    activations: int | None = key(
        Size(none_word="none"),
        "memory for activations that stay until backward, so that their blocks are not computed twice; "
        "auto: what is free beside the weights, where offload.ram (on a device offload.vram) is auto",
        default=None,
        example="2GB",
    )
    nvme_activations: int | None = key(
        Size(none_word="none"),
        "space of the drive (in offload.path) for activations that wait there until backward, as far as their blocks are "
        "not computed twice and not kept in memory; auto: as much as `ssdtune train` finds free and predicts to be worth "
        "it, which takes a profile. Every step writes them: none by default, for the drive's sake",
        default=0,
        example="50GB",
    )
    max_writes: int | None = key(
        Size(),
        "most that a run may write to the drive: block inputs, activations, the working copy of zo_trains: all, checkpoints, a "
        "model that is packed first. What would write more is not chosen, and refused where nothing else fits; auto: any "
        "amount",
        default=None,
        example="200GB",
    )
    storage: str = key(
        OneOf(("auto", "direct", "buffered", "gds")),
        "how files are read: O_DIRECT, through the page cache, or GPUDirect Storage; "
        "auto: what a self-test at start finds fastest and right",
        default="auto",
    )
    reader_threads: int = key(
        Whole(1, 64), "threads that read; two reach the rate of most drives", default=2
    )
    loss_chunk_tokens: int | None = key(
        Or("auto", Whole(1, 2**24)),
        "tokens whose logits exist at once; a whole micro-batch is exact to the bit",
        default=None,
        example="1024",
    )
    allow_unchecked: bool = key(
        YesNo(),
        "stream an architecture whose self-check could not be run, at your own risk",
        default=False,
    )

    def __post_init__(self) -> None:
        read_again(self)

    @classmethod
    def of(cls, value: "Offload | Mapping[str, Any] | None") -> "Offload":
        """An Offload from what a caller gave: itself, a dict such as {"ram": "300MB"}, or None."""
        if isinstance(value, cls):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"Offload: got {shown(value)}.\n"
                'Write offload={"ram": "300MB"} or offload=ssdtune.Offload(ram="300MB").'
            )
        return read_record(cls, Node.of(value or {}, "Offload"))
