"""A packing with what a person sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

from ssdtune.packing.convert import Note, Packed, pack
from ssdtune.packing.layout import Group
from ssdtune.report import duration, say
from ssdtune.sizes import format_size
from ssdtune.swap.storage import Storage
from ssdtune.visit.build import MetaModel


def pack_aloud(
    meta: MetaModel,
    groups: Sequence[Group],
    out: Path,
    label: str,
    storage: Storage,
    *,
    note: Note | None = None,
) -> Packed:
    """Packs the model of `meta` with a progress bar and a line before and after. label: of the groups' formats. note: as
    for `pack`. Raises SSDTuneError."""
    total = sum(t.num_bytes for g in groups for t in g.tensors)
    expected = sum(g.num_bytes for g in groups)
    say(f"packing   {meta.folder}: {format_size(total)} to {format_size(expected)} ({label})")
    started = perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, desc="packing") as bar:

        def advance(num_bytes: int) -> None:
            bar.update(num_bytes)

        done = pack(meta, groups, out, storage=storage, on_progress=advance, note=note)
    share = done.num_packed / max(done.num_weights, 1)
    say(
        f"written   {out}: {format_size(done.num_bytes)}, {done.bits_per_weight:.2f} bits a weight over the "
        f"whole model, {share:.1%} of the weights packed, in {duration(perf_counter() - started)}"
    )
    return done
