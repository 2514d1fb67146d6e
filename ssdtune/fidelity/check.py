"""`ssdtune pack --check`: what a packed model is off by, in its weights, in what blocks hand on, in the loss on a text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ssdtune.api import choose, stream
from ssdtune.fidelity.beside import Measured, measure
from ssdtune.fidelity.record import keep
from ssdtune.fidelity.text import Text, load_text
from ssdtune.packing.layout import PackError
from ssdtune.packing.once import build_planned, listed
from ssdtune.packing.widths import is_by_block, mean_of
from ssdtune.report import duration, format_table, say
from ssdtune.run_files import CHECK_NAME
from ssdtune.swap.packed import PackedEntry, affine_of
from ssdtune.visit.build import MetaModel, build_meta

if TYPE_CHECKING:
    from ssdtune.swap.source import Checkpoint


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """Mean losses of a token, and the standard error of their difference; None: of one row nobody knows."""

    source: float
    packed: float
    standard_error: float | None

    @property
    def words(self) -> str:
        """The difference as a person reads it."""
        more = self.packed - self.source
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{more:+.4f}{error} ({more / self.source:+.1%})"


def paired(losses: tuple[Sequence[float], Sequence[float]], counts: Sequence[int]) -> Costs:
    """The losses of both over all tokens, and how far the rows leave their difference uncertain.

    counts: tokens in each row's loss. The standard error is that of a ratio of sums over rows (Cochran, "Sampling
    Techniques", 1977, eq. 6.13), of the paired differences.
    """
    total = sum(counts)
    source, packed = (
        math.fsum(loss * n for loss, n in zip(of_one, counts, strict=True)) / total
        for of_one in losses
    )
    increase = packed - source
    off = [n * (p - s - increase) for s, p, n in zip(*losses, counts, strict=True)]
    if len(off) < 2:
        return Costs(source, packed, None)
    spread = math.fsum(x * x for x in off) * len(off) / (len(off) - 1)
    return Costs(source, packed, math.sqrt(spread) / total)


def open_text(path: str | None, model: str) -> Text:
    """The rows that `model` is checked on. path: of a data file, None: the quickstart's held-out text. Raises SSDTuneError
    as `load_text` does."""
    return load_text(path or _default_text(), model)


def check_aloud(model: str, folder: Path, rows: Text, *, bits: str | None = None) -> None:
    """Compares the packed model in `folder` with `model`, prints a table, keeps it in `folder`/pack_check.json.

    rows: as `open_text` has them. bits: of nested codes, those that are read, "4", "4.5/8" or "5,28x4,6/8"; None: all.
    Raises SSDTuneError for a folder that holds no packing of this model.
    """
    packed, reading = _opened(folder, bits)
    say(
        f"checking  {reading} against {model} on {len(rows.counts)} rows, {sum(rows.counts):,} tokens of {rows.name}"
    )
    started = perf_counter()
    source: Any = stream(model, micro_batch_size=1)
    try:
        storage = choose("auto", packed.checkpoint.files)
        found = measure(source, packed, rows, storage)
    finally:
        source.ssdtune.close()
    costs = paired(found.losses, rows.counts)
    for line in lines_of(found, costs):
        say(line)
    keep(folder, reading, _record(model, rows, found, costs))
    say(f"kept      {folder / CHECK_NAME}, in {duration(perf_counter() - started)}")


def refuse_bits(bits: str | None) -> None:
    """Raises PackError for what `check_aloud` takes for none."""
    if bits is not None and not is_by_block(bits):
        _whole(bits)


def _opened(folder: Path, bits: str | None) -> tuple[MetaModel, str]:
    """The packed model, and how it is read, in words: as `reading_of`, or the bits of blocks."""
    if bits is not None and is_by_block(bits):
        reading_of(build_meta(folder).checkpoint)  # refuses what is not packed
        if mean_of(bits) is not None:
            bits = listed(folder, quantization=bits).quantization
        return build_planned(folder, quantization=bits), bits
    packed = build_meta(folder, bits=None if bits is None else _whole(bits))
    return packed, reading_of(packed.checkpoint)


def _whole(bits: str) -> int:
    if not bits.isdigit() or not 1 <= int(bits) <= 8:
        raise PackError(f"--check_bits {bits}: 1 to 8, 4.5/8 or 5,28x4,6/8 are possible.")
    return int(bits)


def reading_of(checkpoint: Checkpoint) -> str:
    """How the packed tensors are read: "4", "mixed" (widths by tensor), or the format. Raises PackError where none is
    packed."""
    formats = {e.format for e in checkpoint.tensors.values() if isinstance(e, PackedEntry)}
    if not formats:
        raise PackError(
            f"{checkpoint.folder} is not packed: there is nothing to check.\nGive the --out of `ssdtune pack`."
        )
    codes = [affine_of(format) for format in formats]
    widths = {f.label if c is None else str(c.bits) for f, c in zip(formats, codes, strict=True)}
    if len(widths) > 1 and None not in codes:
        return "mixed"
    return min(widths)


def _default_text() -> str:
    from ssdtune.assets import prepare_text
    from ssdtune.cache import cache_folder

    _, held_out = prepare_text(cache_folder())
    say(
        f"text      {held_out}: Python's language reference, as in the quickstart; "
        "--check_text FILE for text of your own, which says more about your use"
    )
    return str(held_out)


# ------------------------------------------------------------------ the answer


def lines_of(found: Measured, costs: Costs) -> Iterator[str]:
    """Yields a table of blocks, then the losses."""
    rows = [
        (
            name,
            _share(squares.relative),
            _share(found.outputs[name].relative) if name in found.outputs else "",
        )
        for name, squares in found.weights.items()
    ]
    yield format_table(rows, header=("block", "error of weights", "of outputs"))
    yield "errors are squared and relative: |packed - source|² / |source|²"
    yield f"loss      {costs.source:.4f} → {costs.packed:.4f}: {costs.words}"


def _share(value: float) -> str:
    return f"{value:.3g}"


def _record(model: str, rows: Text, found: Measured, costs: Costs) -> dict[str, Any]:
    return {
        "model": str(model),
        "text": rows.name,
        "rows": len(rows.counts),
        "tokens": sum(rows.counts),
        "source_loss": costs.source,
        "packed_loss": costs.packed,
        "standard_error": costs.standard_error,
        "blocks": [
            {
                "name": name,
                "weights": squares.relative,
                "outputs": found.outputs[name].relative if name in found.outputs else None,
            }
            for name, squares in found.weights.items()
        ],
    }
