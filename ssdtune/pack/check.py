"""`ssdtune pack --check`: what a packed model is off by, in its weights, in what blocks hand on, in the loss on a text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ssdtune.api import choose, stream
from ssdtune.kernels.affine import Affine
from ssdtune.pack.beside import Measured, measure
from ssdtune.pack.record import keep
from ssdtune.packing.layout import PackError
from ssdtune.report import duration, format_table, say
from ssdtune.run_files import CHECK_NAME
from ssdtune.swap.packed import PackedEntry
from ssdtune.trainer.run import open_tokenizer
from ssdtune.visit.build import build_meta

if TYPE_CHECKING:
    import torch

    from ssdtune.swap.source import Checkpoint

MOST_TOKENS = 4096  # of the text; their hidden states are in memory, twice
ROW_TOKENS = 1024  # of a row; the rest of it is left out


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """What both models are run on. batches: one row each. counts: tokens in each row's loss."""

    name: str
    batches: Sequence[Mapping[str, torch.Tensor]]
    counts: Sequence[int]


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


def check_aloud(
    model: str, folder: Path, *, text: str | None = None, bits: int | None = None
) -> None:
    """Compares the packed model in `folder` with `model`, prints a table, keeps it in `folder`/pack_check.json.

    text: a data file, None: the quickstart's held-out text. bits: of nested codes, those that are read; None: all.
    Raises SSDTuneError for a folder that holds no packing of this model, and for data as training would.
    """
    packed = build_meta(folder, bits=bits)
    reading = reading_of(packed.checkpoint)
    rows = load_text(text, model)
    say(
        f"checking  {reading} against {model} on {len(rows.counts)} rows, {sum(rows.counts):,} tokens of {rows.name}"
    )
    started = perf_counter()
    source: Any = stream(model, micro_batch_size=1)
    try:
        storage = choose("auto", packed.checkpoint.files)
        found = measure(source, packed, rows.batches, storage)
    finally:
        source.ssdtune.close()
    costs = paired(found.losses, rows.counts)
    for line in lines_of(found, costs):
        say(line)
    keep(folder, reading, _record(model, rows, found, costs))
    say(f"kept      {folder / CHECK_NAME}, in {duration(perf_counter() - started)}")


def reading_of(checkpoint: Checkpoint) -> str:
    """How the packed tensors are read: "4", "mixed" (widths by tensor), or the format. Raises PackError where none is
    packed."""
    formats = {e.format for e in checkpoint.tensors.values() if isinstance(e, PackedEntry)}
    if not formats:
        raise PackError(
            f"{checkpoint.folder} is not packed: there is nothing to check.\nGive the --out of `ssdtune pack`."
        )
    widths = {str(f.bits) if isinstance(f, Affine) else f.label for f in formats}
    kinds = {type(f) for f in formats}
    if len(widths) > 1 and kinds == {Affine}:
        return "mixed"
    return min(widths)


# ------------------------------------------------------------------ the text


def load_text(path: str | None, model: str) -> Text:
    """The first rows of a data file, MOST_TOKENS at most, tokenized by the model's tokenizer; what trains has a loss."""
    from ssdtune.data import CausalCollator, choose_pad_token, load_dataset_rows, tokenize_rows

    if path is None:
        path = _default_text()
    tokenizer = open_tokenizer(model)
    rows = load_dataset_rows({"path": path}).first(MOST_TOKENS)
    dataset = tokenize_rows(rows, tokenizer, max_length=ROW_TOKENS).dataset
    collate = CausalCollator(choose_pad_token(tokenizer).token_id)
    batches: list[Mapping[str, torch.Tensor]] = []
    num_tokens = 0
    for row in dataset:
        num_tokens += len(row["input_ids"])  # pyright: ignore[reportCallIssue, reportArgumentType]
        if batches and num_tokens > MOST_TOKENS:
            break
        batches.append(collate([row]))  # pyright: ignore[reportArgumentType]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    kept = [i for i, count in enumerate(counts) if count]
    return Text(path, [batches[i] for i in kept], [counts[i] for i in kept])


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
