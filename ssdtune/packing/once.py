"""`quantization: 4`: a packed model is read at so many bits, another one packed once, beside the runs, and used from
then on."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssdtune.cache import cache_folder
from ssdtune.durable import make_folder
from ssdtune.kernels.formats import Format
from ssdtune.packing.by_block import (
    Listed,
    file_to_be,
    listed_best,
    packed_file,
    read_by_block,
)
from ssdtune.packing.convert import key_of
from ssdtune.packing.earlier import refuse_second
from ssdtune.packing.layout import Group, PackError, groups_of, imagined
from ssdtune.packing.progress import pack_aloud
from ssdtune.packing.wanted import Wanted, bits_of, word_of
from ssdtune.packing.widths import is_by_block, mean_of
from ssdtune.swap.beside import CONFIG
from ssdtune.swap.packed import PackedEntry, affine_of
from ssdtune.swap.storage import Storage
from ssdtune.visit.build import MetaModel, build_meta

NONE = "none"


def build_planned(
    name: str | os.PathLike[str], *, quantization: str = NONE, **build: Any
) -> MetaModel:
    """`build_meta`; a model that is not packed has the entries that it would have once packed, for plans alone."""
    return build_and_plan(name, quantization=quantization, **build)[1]


def build_and_plan(
    name: str | os.PathLike[str], *, quantization: str = NONE, **build: Any
) -> tuple[MetaModel, MetaModel]:
    """The model as it is, and as `build_planned` has it."""
    meta = _build(name, quantization, **build)
    if quantization == NONE:
        return meta, meta
    quantization = _with_widths(meta, quantization)
    if is_packed(meta):
        return meta, _read(meta, quantization)
    return meta, planned(meta, quantization)


def listed(name: str | os.PathLike[str], *, quantization: str, **build: Any) -> Listed:
    """What `build_planned` and `build_packed` of the same arguments read a model in for an average, "4.5/8"."""
    return _listed(_build(name, quantization, **build), quantization)


def _listed(meta: MetaModel, quantization: str) -> Listed:
    """meta: as `build_meta` has it, so that the same is chosen before and after packing."""
    mean = mean_of(quantization)
    assert mean is not None, quantization
    file = packed_file(meta) if is_packed(meta) else file_to_be(meta, quantization)
    return listed_best(meta, file, mean)


def _with_widths(meta: MetaModel, quantization: str) -> str:
    """The value with an average replaced by widths of blocks."""
    if mean_of(quantization) is None:
        return quantization
    return _listed(meta, quantization).quantization


def _read(meta: MetaModel, quantization: str) -> MetaModel:
    """A packed model, its blocks in the widths that are listed, where they are."""
    if not is_by_block(quantization):
        return meta
    return read_by_block(meta, packed_file(meta), quantization)


def planned(meta: MetaModel, quantization: str) -> MetaModel:
    """The model, which is not packed, with the entries that it would have once packed, for plans alone."""
    if is_by_block(quantization):
        return read_by_block(meta, file_to_be(meta, quantization), quantization)
    groups = groups_of(meta, Wanted.of(quantization).chosen())
    checkpoint = imagined(meta.checkpoint, groups, bits=bits_of(quantization))
    return dataclasses.replace(meta, checkpoint=checkpoint)


def folder_of(meta: MetaModel, quantization: str, beside: Path | None) -> Path:
    """Where the model's packed twin is, or would be. One file serves all widths that can be read from it."""
    groups = groups_of(meta, Wanted.of(quantization).chosen())
    key = key_of(meta.checkpoint, groups)[:12]
    name = re.sub(r"[^\w.-]+", "-", Path(meta.model.name_or_path or meta.folder).name)[-60:]
    kind = quantization.split("/")[-1]
    return (beside or cache_folder()) / "packed" / f"{name}-{kind}-{key}"


@dataclasses.dataclass(frozen=True, slots=True)
class Twin:
    """A model's packed twin, as it would be made now. groups: its tensors."""

    folder: Path
    format: Format
    groups: tuple[Group, ...]

    @property
    def is_there(self) -> bool:
        """Whether it was made, by this run or an earlier one."""
        return (self.folder / CONFIG).is_file()

    @property
    def num_bytes(self) -> int:
        """Of its weights."""
        return sum(group.num_bytes for group in self.groups)

    @property
    def source_bytes(self) -> int:
        """Of the weights that it is made from."""
        return sum(tensor.num_bytes for group in self.groups for tensor in group.tensors)


def twin_of(meta: MetaModel, quantization: str, beside: Path | None) -> Twin | None:
    """None where the model is read as it is. meta: as it is. beside: as for `build_packed`.

    Raises PackError where it is still to be made, and another one of the same format lies beside."""
    if quantization == NONE or is_packed(meta):
        return None
    format = Wanted.of(quantization).chosen()
    groups = tuple(groups_of(meta, format))
    twin = Twin(folder_of(meta, quantization, beside), format, groups)
    if not twin.is_there:
        refuse_second(twin.folder, meta.checkpoint.folder, format)
    return twin


def build_packed(
    name: str | os.PathLike[str],
    *,
    quantization: str,
    beside: Path | None,
    choose_storage: Callable[[Sequence[Path]], Storage],
    **build: Any,
) -> MetaModel:
    """`build_meta` of a model's packed twin, which is made now if it is not there.

    beside: a folder on a fast drive for it; None: the cache. choose_storage: what reads a model's files. Raises
    SSDTuneError as packing does.
    """
    meta = _build(name, quantization, **build)
    if quantization == NONE:
        return meta
    quantization = _with_widths(meta, quantization)
    twin = twin_of(meta, quantization, beside)
    if twin is None:
        return _read(meta, quantization)
    with _alone(twin.folder):
        if not twin.is_there:
            storage = choose_storage(meta.checkpoint.files)
            pack_aloud(meta, twin.groups, twin.folder, twin.format.label, storage)
    build.pop("revision", None)
    packed = _read(build_meta(twin.folder, bits=bits_of(quantization), **build), quantization)
    packed.model.name_or_path = packed.model.config.name_or_path = meta.model.name_or_path
    origin = dataclasses.replace(meta.origin, source=meta.model.name_or_path)
    return dataclasses.replace(packed, origin=origin)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of several processes that want the folder one packs, the others wait for it."""
    make_folder(folder.parent)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        # The kernel lets go of it when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(name: str | os.PathLike[str], quantization: str, **build: Any) -> MetaModel:
    bits = bits_of(quantization)
    meta = build_meta(name, bits=bits, **build)
    if quantization != NONE:
        _check_agrees(meta, quantization)
    return meta


def is_packed(meta: MetaModel) -> bool:
    """Whether any of its tensors is, by whomever."""
    return any(isinstance(entry, PackedEntry) for entry in meta.checkpoint.tensors.values())


def _check_agrees(meta: MetaModel, quantization: str) -> None:
    """Raises PackError where a packed model is asked for at other bits, or in another format, than it can be read in."""
    Wanted.of(quantization).chosen()
    if is_by_block(quantization):
        return  # `packed_file` and `read_by_block` see whether it can be
    word = quantization.split("/")[0]  # of "4/8" the bits that are read
    for entry in meta.checkpoint.tensors.values():
        if not isinstance(entry, PackedEntry) or word_of(entry.format) == word:
            continue
        format = entry.format
        found = format.label
        if (codes := affine_of(format)) is not None:
            rotated = ", rotated" if codes is not format else ""
            found = f"affine{rotated}, to be read at {', '.join(map(str, codes.readings))} bits"
        raise PackError(
            f"quantization: {quantization}, but {meta.folder} is packed already ({found}).\n"
            "Delete the key (and write method: lora instead of qlora), or give the model that it was made from."
        )
