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
from ssdtune.kernels.affine import Affine
from ssdtune.packing.convert import key_of
from ssdtune.packing.layout import PackError, groups_of, imagined
from ssdtune.packing.progress import pack_aloud
from ssdtune.packing.wanted import Wanted, bits_of, word_of
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.storage import Storage
from ssdtune.visit.build import MetaModel, build_meta

NONE = "none"


def build_planned(
    name: str | os.PathLike[str], *, quantization: str = NONE, **build: Any
) -> MetaModel:
    """`build_meta`; a model that is not packed has the entries that it would have once packed, for plans alone."""
    meta = _build(name, quantization, **build)
    return meta if quantization == NONE or _is_packed(meta) else planned(meta, quantization)


def planned(meta: MetaModel, quantization: str) -> MetaModel:
    """The model, which is not packed, with the entries that it would have once packed, for plans alone."""
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
    if quantization == NONE or _is_packed(meta):
        return meta
    format = Wanted.of(quantization).chosen()
    groups = groups_of(meta, format)
    folder = folder_of(meta, quantization, beside)
    with _alone(folder):
        if not (folder / "config.json").is_file():
            pack_aloud(meta, groups, folder, format.label, choose_storage(meta.checkpoint.files))
    build.pop("revision", None)
    packed = build_meta(folder, bits=bits_of(quantization), **build)
    packed.model.name_or_path = packed.model.config.name_or_path = meta.model.name_or_path
    origin = dataclasses.replace(meta.origin, source=meta.model.name_or_path)
    return dataclasses.replace(packed, origin=origin)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of several processes that want the folder one packs, the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
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


def _is_packed(meta: MetaModel) -> bool:
    return any(isinstance(entry, PackedEntry) for entry in meta.checkpoint.tensors.values())


def _check_agrees(meta: MetaModel, quantization: str) -> None:
    """Raises PackError where a packed model is asked for at other bits, or in another format, than it can be read in."""
    Wanted.of(quantization).chosen()
    word = quantization.split("/")[0]  # of "4/8" the bits that are read
    for entry in meta.checkpoint.tensors.values():
        if not isinstance(entry, PackedEntry) or word_of(entry.format) == word:
            continue
        format = entry.format
        found = format.label
        if isinstance(format, Affine):
            found = f"affine, to be read at {', '.join(map(str, format.readings))} bits"
        raise PackError(
            f"quantization: {quantization}, but {meta.folder} is packed already ({found}).\n"
            "Delete the key (and write method: lora instead of qlora), or give the model that it was made from."
        )
