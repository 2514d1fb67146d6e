"""`ssdtune pack`: packs where that is not done yet (packing/), checks where that is asked for (fidelity/)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from ssdtune.api import choose, stream
from ssdtune.packing.convert import is_packed_as, noted
from ssdtune.packing.errors import WIDTHS, affine, sampled_errors
from ssdtune.packing.layout import Group, PackError, groups_of
from ssdtune.packing.mixed import shares, weights_of, widths_in, with_widths, within
from ssdtune.packing.progress import pack_aloud
from ssdtune.packing.wanted import AFFINE, Wanted
from ssdtune.report import duration, say
from ssdtune.visit.build import MetaModel, build_meta


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command was given.

    Attributes:
        model: a folder or hub id. out: the folder to write, or one that is packed and is to be checked.
        wanted: the format; None: nobody said, 4 bits where there is something to pack.
        target_bpw: bits a weight over the whole model, with widths by tensor; None: one width. text: rows whose
            gradients tell how much the loss depends on a tensor, of any data file that trains; None: tensors count by
            their number of weights.
        keep: patterns of names of tensors that stay as they are.
        checks: whether to compare the packed model with its source afterwards. check_text: rows for it, of any data
            file that trains; None: the quickstart's held-out text. check_bits: of nested codes, those that are read;
            None: all.
    """

    model: str
    out: Path
    wanted: Wanted | None = None
    target_bpw: float | None = None
    text: str | None = None
    keep: tuple[str, ...] = ()
    checks: bool = False
    check_text: str | None = None
    check_bits: str | None = None


def run_pack(request: Request) -> int:
    """Packs, checks, says what came of it. Raises SSDTuneError."""
    is_there = (request.out / "config.json").is_file()
    is_free = request.wanted is None and request.target_bpw is None and not request.keep
    is_only_checked = request.checks and is_there and is_free
    if not request.checks:
        _pack(request)
    else:
        from ssdtune.fidelity.check import check_aloud, open_text, refuse_bits

        refuse_bits(request.check_bits)  # before hours of packing
        rows = open_text(request.check_text, request.model)
        if not is_only_checked:
            _pack(request)
        check_aloud(request.model, request.out, rows, bits=request.check_bits)
    say(f"train it  model_name_or_path: {request.out}")
    return 0


def _pack(request: Request) -> None:
    meta = build_meta(request.model)
    asked = _asked(request, meta)
    groups, label = _groups(request, meta, asked)
    if request.checks and is_packed_as(request.out, meta.checkpoint, groups):
        say(f"there is  {request.out}: packed like this already")
        return
    storage = choose("auto", meta.checkpoint.files)
    note = {} if asked is None else {"asked": asked, "widths": widths_in(groups)}
    pack_aloud(meta, groups, request.out, label, storage, note=note)


def _asked(request: Request, meta: MetaModel) -> dict[str, Any] | None:
    """What widths by tensor hang on; None where there is one width."""
    if request.target_bpw is None:
        return None
    group_size = (request.wanted or Wanted()).group_size
    return {
        "source": meta.checkpoint.fingerprint(),
        "target_bpw": request.target_bpw,
        "group": group_size,
        "text": request.text,
        "keep": list(request.keep),
    }


def _groups(
    request: Request, meta: MetaModel, asked: dict[str, Any] | None
) -> tuple[Sequence[Group], str]:
    """What is packed as what, and words for it. asked: as `_asked` has it."""
    wanted = request.wanted or Wanted()
    if asked is None:
        format = wanted.chosen()
        return groups_of(meta, format, keep=request.keep), format.label
    if wanted.format != AFFINE:
        raise PackError(
            f"--target_bpw mixes widths of affine codes; --format {wanted.format} has one.\nLeave one of them out."
        )
    wanted.chosen()  # refuses a group size that is not possible
    groups = groups_of(meta, affine(WIDTHS[0], wanted.group_size), keep=request.keep)
    begun = noted(request.out)
    if begun.get("asked") == asked:
        say(f"going on  {request.out}: in the widths that were chosen when it was begun")
        mixed = with_widths(groups, begun.get("widths", {}), wanted.group_size)
    else:
        mixed = _chosen(request, meta, groups, wanted.group_size)
    told = ", ".join(f"{words} {share:.1%}" for words, share in shares(mixed).items())
    return mixed, f"widths by tensor: {told} of the weights"


def _chosen(
    request: Request, meta: MetaModel, groups: Sequence[Group], group_size: int
) -> Sequence[Group]:
    """The widths that are best within the target."""
    assert request.target_bpw is not None
    fisher = None if request.text is None else _fisher(request.model, meta, groups, request.text)
    num_tensors = sum(len(group.formats) for group in groups)
    with tqdm(total=num_tensors, unit=" tensors", desc="what each width costs") as bar:
        found = sampled_errors(groups, group_size, bar.update)
    return within(groups, request.target_bpw, group_size, found, weights_of(groups, found, fisher))


def _fisher(model: str, meta: MetaModel, groups: Sequence[Group], text: str) -> dict[str, float]:
    """Mean Fisher information of all that is to be packed, on a text; says how long that took."""
    from ssdtune.fidelity.fisher import check_seen, fisher
    from ssdtune.fidelity.text import load_text

    rows, started = load_text(text, model), perf_counter()
    source: Any = stream(model, micro_batch_size=1)
    try:
        found = fisher(source, meta, rows)
    finally:
        source.ssdtune.close()
    check_seen([name for group in groups for name in group.formats], found, rows)
    took = duration(perf_counter() - started)
    say(
        f"gradients of {len(found)} tensors on {rows.num_tokens:,} tokens of {rows.name}, in {took}"
    )
    return found
