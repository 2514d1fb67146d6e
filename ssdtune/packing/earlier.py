"""Packings of a model beside the one that would be made of it now: of an earlier encoder, or of weights that have changed
since. Runs that began on them have other weights than a new one would give them."""

from __future__ import annotations

import dataclasses
import glob
import json
from pathlib import Path

from ssdtune.kernels.formats import Format
from ssdtune.kernels.lossless import Lossless
from ssdtune.packing.layout import PackError
from ssdtune.swap.beside import CONFIG
from ssdtune.swap.header import CheckpointError
from ssdtune.swap.pack_header import unpacked
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.source import open_checkpoint


def refuse_second(folder: Path, source: Path, format: Format) -> None:
    """Raises PackError where the same folder was packed in the same format already, into another one beside `folder`.

    folder: of the packing to be made; its name ends with a key of what is packed and how."""
    others = f"{glob.escape(folder.name.rpartition('-')[0])}-*/{CONFIG}"
    for config in sorted(folder.parent.glob(others)):
        other = config.parent
        if other != folder and _is_of(config, source) and _formats(other) == {_whole(format)}:
            raise PackError(
                f"{other} is {source} packed in the same format, by an earlier version of ssdtune or before its files "
                "changed: packed anew, its weights would be others.\n"
                f"A run that began on it goes on with model_name_or_path: {other}. To pack anew, remove that folder or "
                "move it away."
            )


def _is_of(config: Path, source: Path) -> bool:
    """Whether a config.json says that its folder was packed from `source`."""
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
        return told["quantization_config"]["source"] == str(source.absolute())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _formats(folder: Path) -> set[Format]:
    """Those of a packed folder's tensors; none where it can't be read."""
    try:
        entries = unpacked(open_checkpoint(folder)).tensors.values()
    except CheckpointError:
        return set()
    return {_whole(entry.format) for entry in entries if isinstance(entry, PackedEntry)}


def _whole(format: Format) -> Format:
    """Without what depends on the weights."""
    is_lossless = isinstance(format, Lossless)
    return dataclasses.replace(format, num_escapes=0) if is_lossless else format
