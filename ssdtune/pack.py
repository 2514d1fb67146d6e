"""What `ssdtune pack` does."""

from __future__ import annotations

from pathlib import Path

from ssdtune.api import choose
from ssdtune.packing.layout import groups_of
from ssdtune.packing.progress import pack_aloud
from ssdtune.packing.wanted import Wanted
from ssdtune.report import say
from ssdtune.visit.build import build_meta


def pack_model(model: str, out: Path, wanted: Wanted) -> int:
    """Packs a folder or hub id into `out`; says what came of it. Raises SSDTuneError."""
    meta = build_meta(model)
    format = wanted.chosen()
    storage = choose("auto", meta.checkpoint.files)
    pack_aloud(meta, groups_of(meta, format), out, format, storage)
    say(f"train it  model_name_or_path: {out}")
    return 0
