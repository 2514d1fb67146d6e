"""A model opened for planning, without its weights: from a source to what `Job`s are made of.

Everything here needs torch and transformers; `jobs.py` imports it only where its cache has not what is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.jobs import AUTO, opens_directions
from ssdtune.schedule.cost import Work
from ssdtune.schedule.job import Directions, Job, Reading, Rows, in_proportion, mean_padded

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.data.stats import DataStats
    from ssdtune.data.tokens import Tokenized
    from ssdtune.jobs import Source
    from ssdtune.packing.once import Twin
    from ssdtune.schedule.cost import Moves, StepWork
    from ssdtune.schedule.plan import BlockShape
    from ssdtune.schedule.planner import Order
    from ssdtune.swap.recipe import BlockRecipe
    from ssdtune.visit.build import MetaModel
    from ssdtune.visit.draft import Draft

SAMPLE_ROWS = 2000  # of a data set that are tokenized to estimate the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A source's model, adapters on it, and its data, whatever the micro-batch.

    Attributes:
        base_bytes: of the process before.
        meta, options, drafted, adapted: the model, how its blocks are drafted, the draft, the model with adapters.
        resident_bytes: of what lies outside of blocks.
        num_parameters, dtype: of the model without adapters; the type is that of most of them.
        rows: as if each stood alone in its micro-batch.
        lengths: tokens of the rows that were looked at; empty: there are no data.
        sequences: texts that a row becomes in a micro-batch.
        readings, file_dtype, lossless_ratio: as `Job` has them.
        twin: the packed file that a run makes first; None: none.
    """

    base_bytes: int
    meta: MetaModel
    options: Any
    drafted: Draft
    adapted: Any
    resident_bytes: int
    num_parameters: int
    dtype: str
    rows: Rows
    lengths: Sequence[int]
    sequences: int
    readings: tuple[Reading, ...] = ()
    file_dtype: str = ""
    lossless_ratio: float | None = None
    twin: Twin | None = None


def open_source(source: Source) -> Opened:
    """Raises SSDTuneError as training would before it starts."""
    with _uncollected():
        import peft  # noqa: F401 (as a run does before it looks at what it holds)
        from transformers.utils import logging

        from ssdtune.report import hush_libraries
        from ssdtune.visit.memory import resident_set_bytes

        logging.set_verbosity_error()
        hush_libraries()
        base_bytes = (
            resident_set_bytes()
        )  # what a run begins with: libraries are there, nothing else
        path = Path(source.name).expanduser()
        if not path.is_file() or path.suffix == ".gguf":
            return _open(source, source.name, base_bytes)
        from ssdtune.visit.outline import write_outline

        with tempfile.TemporaryDirectory(prefix="ssdtune-outline-") as scratch:
            write_outline(path, Path(scratch), source.config.dtype)
            return _open(source, scratch, base_bytes)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is looked for, for a `with` block: imports make much that stays and little that goes, and the looking
    is a seventh of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open(source: Source, model: str, base_bytes: int) -> Opened:
    import torch

    from ssdtune.api import build_arguments
    from ssdtune.packing.once import NONE, build_and_plan, twin_of
    from ssdtune.packing.readings import readings_of
    from ssdtune.packing.sample import lossless_ratio
    from ssdtune.peft import attach, lora_config
    from ssdtune.trainer.opening import trains_all
    from ssdtune.visit.draft import draft

    arguments = build_arguments(source.config)
    chooses = arguments.get("quantization") == AUTO
    if chooses:
        del arguments["quantization"]
    plain, meta = build_and_plan(model, **arguments)
    options = _options(source, meta)
    drafted = draft(meta, options)
    has_weights = model == source.name  # of a config.json alone there are headers
    path = source.config.offload.path
    twin = twin_of(plain, arguments.get("quantization", NONE), path)
    readings = ()
    ratio = lossless_ratio(meta) if has_weights else None
    if chooses:  # before there are adapters
        readings = readings_of(
            meta,
            options,
            path,
            has_weights=has_weights,
            formats=_formats(source.config),
            ratio=ratio,
        )
    base: Any = meta.model
    parameters = list(base.parameters())
    resident = _resident_bytes(meta, {n for group in drafted.groups for n in group.parameters})
    rows, lengths, sequences = _rows(source, meta)
    with torch.device("meta"):  # adapters too have no memory yet
        is_of_all = trains_all(source.config)
        adapted = base if is_of_all else attach(base, lora_config(source.config, base))
    return Opened(
        base_bytes=base_bytes,
        meta=meta,
        options=options,
        drafted=drafted,
        adapted=adapted,
        resident_bytes=resident,
        num_parameters=sum(p.numel() for p in parameters),
        dtype=statistics.mode(str(p.dtype).removeprefix("torch.") for p in parameters),
        rows=rows,
        lengths=lengths,
        sequences=sequences,
        readings=readings,
        file_dtype=_file_dtype(meta),
        lossless_ratio=ratio,
        twin=twin,
    )


def _formats(config: TrainConfig) -> tuple[str, ...]:
    """Besides affine codes, those that `quantization: auto` may pack for what the configuration does with them."""
    from ssdtune.packing.readings import TABLE
    from ssdtune.packing.wanted import LOSSLESS

    if config.method == "zo" and config.zo_packed == "moved":
        return ()  # others are not moved
    begins_at_loss = config.init_lora_weights == "loftq"
    return (*TABLE.values(),) if begins_at_loss else (*TABLE.values(), LOSSLESS)


def job_from_opened(source: Source, opened: Opened) -> Job:
    """The job of the source's configuration, micro-batch and all."""
    import torch

    from ssdtune.schedule.memory import MOST_STATES, NUM_STATES, Fixed
    from ssdtune.trainer.opening import trains_all
    from ssdtune.visit.rehearsal import autocast_of, rehearse_draft

    config, drafted, adapted = source.config, opened.drafted, opened.adapted
    base: Any = opened.meta.model
    is_of_all = trains_all(config)
    at_once = config.per_device_train_batch_size
    on_cpu = dataclasses.replace(opened.options, device=torch.device("cpu"))
    rows = opened.rows
    if opened.lengths:
        rows = dataclasses.replace(rows, padded_tokens=mean_padded(opened.lengths, at_once))

    def rehearsed(length: int) -> Any:
        batch = {"input_ids": torch.zeros(at_once * opened.sequences, length, dtype=torch.long)}
        with autocast_of(config, on_cpu.device):
            return rehearse_draft(adapted, drafted, on_cpu, batch)

    usual = rehearsed(round(rows.padded_tokens))
    longest = usual if round(rows.padded_tokens) == rows.longest else rehearsed(rows.longest)
    trained = [p for p in adapted.parameters() if p.requires_grad] if not is_of_all else []
    trained_bytes = sum(p.nbytes for p in trained)
    outside_bytes = opened.resident_bytes if is_of_all else 0
    steps = _steps(source, drafted, trained, outside_bytes)
    work = usual.work
    if work is not None:
        work = dataclasses.replace(work, moves=steps.moves)
    request = drafted.replanner.request
    return Job(
        model=Path(source.name).name if source.model is None else source.name,
        architecture=type(base).__name__,
        dtype=opened.dtype,
        num_parameters=opened.num_parameters,
        num_trained=opened.num_parameters if is_of_all else sum(p.numel() for p in trained),
        blocks=_blocks(source, drafted),
        orders=_orders(request.orders, work),
        work=work,
        footprint=longest.footprint,
        fixed=Fixed(
            base_bytes=opened.base_bytes,
            resident_bytes=opened.resident_bytes,
            trained_bytes=trained_bytes,
            gradient_bytes=trained_bytes,
            optimizer_bytes=NUM_STATES.get(str(config.optim), MOST_STATES) * trained_bytes,
            library_bytes=_library_bytes(source, opened),
            more=steps.more,
        ),
        rows_at_once=at_once,
        micro_batches=config.gradient_accumulation_steps,
        num_steps=config.max_steps if config.max_steps > 0 else None,
        num_epochs=config.num_train_epochs,
        chunk_tokens=opened.options.chunk_tokens,
        visits_vary=request.visits_vary,
        method=steps.words,
        data=rows,
        kind=steps.kind,
        variants=steps.variants,
        fold_steps=steps.fold_steps,
        readings=opened.readings,
        file_dtype=opened.file_dtype,
        lossless_ratio=opened.lossless_ratio,
        directions=_directions(source, steps, drafted, trained, outside_bytes),
        **_packing(opened.twin),
    )


def _library_bytes(source: Source, opened: Opened) -> int:
    """What the math libraries come to hold, were this processor to compute."""
    import torch

    from ssdtune.visit.libraries import library_bytes
    from ssdtune.visit.rehearsal import autocast_of

    with autocast_of(source.config, torch.device("cpu")):
        dtype = getattr(torch, opened.dtype)
        return library_bytes([dtype], lengths_vary=len(set(opened.lengths)) > 1)


def _packing(twin: Twin | None) -> dict[str, Any]:
    """What a job says of the packed file that is made for it."""
    if twin is None:
        return {}
    return {
        "packed_bytes": twin.num_bytes,
        "packed_folder": str(twin.folder),
        "source_bytes": twin.source_bytes,
    }


def _file_dtype(meta: MetaModel) -> str:
    """That of most bytes of the model's tensors, as safetensors names it; of packed ones, what they are decoded to."""
    num_bytes = Counter[str]()
    for entry in meta.checkpoint.tensors.values():
        num_bytes[entry.dtype] += entry.num_bytes
    return max(num_bytes, key=lambda dtype: num_bytes[dtype], default="")


def _orders(likely: Mapping[str, Order], work: StepWork | None) -> Mapping[str, Order]:
    """Without the blocks that these rows do not visit: a vision tower's, where there are no images."""
    if work is None:
        return likely
    visited = {block for passes in work.passes.values() for block, _ in passes}
    return {
        kind: [(block, direction) for block, direction in order if block in visited]
        for kind, order in likely.items()
    }


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What the method makes of a step."""

    words: str
    kind: str = "train"
    variants: int = 1
    fold_steps: int = 0
    more: dict[str, int] = dataclasses.field(default_factory=dict)
    moves: Moves | None = None


def _blocks(source: Source, drafted: Draft) -> tuple[BlockShape, ...]:
    """As slots hold them."""
    from ssdtune.swap.recipe import widened

    if source.config.method == "zo" and source.config.zo_master:
        return tuple(widened(recipe).shape for recipe in drafted.recipes)
    if source.config.method != "zo" or source.config.zo_packed == "decoded":
        return tuple(drafted.replanner.request.blocks)
    return tuple(recipe.shape for recipe in _kept_packed(source, drafted))


def _kept_packed(source: Source, drafted: Draft) -> list[BlockRecipe]:
    """Of blocks that stay packed in their slots, where they are packed."""
    from ssdtune.swap.recipe import kept_packed

    return [
        kept_packed(recipe, on_device=source.on_device) if recipe.packed else recipe
        for recipe in drafted.recipes
    ]


def _with_decoding(source: Source, drafted: Draft, moves: Moves) -> Moves:
    """With what decoding takes of blocks that stay packed in their slots."""
    from ssdtune.trainer.opening import trains_all
    from ssdtune.trainer.zeroth_order import estimator_of
    from ssdtune.zeroth_order.work import with_decoding

    config = source.config
    if config.zo_packed == "decoded":
        return moves
    return with_decoding(
        moves,
        _kept_packed(source, drafted),
        estimator_of(config),
        way=config.zo_packed,
        trains_blocks=trains_all(config),
        on_device=source.on_device,
    )


def _steps(source: Source, drafted: Draft, adapter: list[Any], outside_bytes: int) -> _Steps:
    """adapter: its parameters, all inside blocks. outside_bytes: of what else is moved and lies in memory."""
    config = source.config
    words = f"{'DoRA' if config.use_dora else 'LoRA'} r{config.lora_r}"
    if config.method != "zo":
        return _Steps(words)
    from ssdtune.trainer.opening import trains_all
    from ssdtune.trainer.zeroth_order import estimator_of, rule_of
    from ssdtune.zeroth_order.residents import inside_bytes
    from ssdtune.zeroth_order.weights import extra_bytes
    from ssdtune.zeroth_order.work import moves_of

    estimator = estimator_of(config)
    shifts = estimator.variants
    is_of_all = trains_all(config)
    is_low_rank = config.zo_trains == "low_rank"
    places = {"all": "all weights", "low_rank": "all weights, windows of low rank"}
    is_kept = config.zo_packed != "decoded"
    made = [r.slot_bytes for r in drafted.recipes if is_of_all or (is_kept and r.packed)]
    held = {id(p) for p in adapter}
    every = [[p for point in g.points for p in point.module.parameters()] for g in drafted.groups]
    inside = [[p for p in group if id(p) in held] for group in every]
    moved = [list({id(p): p for p in group}.values()) for group in (every if is_of_all else inside)]
    return _Steps(
        words=f"{config.zo_estimator.upper()} over {places.get(config.zo_trains, words)}",
        kind="forward",
        variants=len(shifts),
        fold_steps=_fold_steps(config),
        more=extra_bytes(
            shifts,
            block=max(made, default=0) + max(map(inside_bytes, inside), default=0),
            outside=outside_bytes,
            held=_held_bytes(config, drafted, outside_bytes),
        ),
        moves=_with_decoding(
            source,
            drafted,
            moves_of(
                {block: [tuple(p.shape) for p in group] for block, group in enumerate(moved)},
                estimator,
                trains_blocks=is_of_all,
                low_rank=is_low_rank,
                rule=rule_of(config),
            ),
        ),
    )


def _directions(
    source: Source, steps: _Steps, drafted: Draft, adapter: list[Any], outside_bytes: int
) -> Directions | None:
    """Those of steps whose number of directions is open, and what one more takes: the rest as `_steps` has it."""
    if not opens_directions(source.config):
        return None
    num = steps.variants - 1  # FZOO's, beside the weights as they are
    config = dataclasses.replace(source.config, zo_num_directions=num + 1)
    more = _steps(dataclasses.replace(source, config=config), drafted, adapter, outside_bytes)
    assert steps.moves is not None
    assert more.moves is not None
    return Directions(
        num=num,
        variants=more.variants - steps.variants,
        memory={name: n - steps.more[name] for name, n in more.more.items()},
        shifts=_beyond(more.moves.shifts, steps.moves.shifts),
        updates=_beyond(more.moves.updates, steps.moves.updates),
    )


def _beyond(more: Mapping[int, Work], less: Mapping[int, Work]) -> dict[int, Work]:
    """Of each block, the work by which one is more than the other."""
    return {
        block: Work(dict(Counter(work.operators) - Counter(less[block].operators)))
        for block, work in more.items()
    }


def _fold_steps(config: TrainConfig) -> int:
    """From one working copy of all weights to the next; 0: there is none."""
    if config.zo_fold_steps is None or config.zo_trains == "adapters":
        return 0
    window = config.zo_window if config.zo_trains == "low_rank" else 1
    return -(-config.zo_fold_steps // window) * window


def _held_bytes(config: TrainConfig, drafted: Draft, outside_bytes: int) -> int:
    """What masters and windows of low rank hold beside what compute reads: what lies outside of blocks once more, at most
    twice as large, and the windows' sums; those of vectors outside of blocks are left out."""
    from ssdtune.trainer.zeroth_order import estimator_of, rule_of
    from ssdtune.zeroth_order.windows import sums_bytes

    if config.zo_master:
        return 2 * outside_bytes
    if config.zo_trains != "low_rank":
        return 0
    shapes = [view.shape for recipe in drafted.recipes for view in recipe.tensors]
    return outside_bytes + sums_bytes(shapes, estimator_of(config).family, rule_of(config))


def _options(source: Source, meta: MetaModel) -> Any:
    """What blocks are drafted with: nothing of this machine but, without a device, how its drive is read."""
    import torch

    from ssdtune.api import DEFAULT_CHUNK_TOKENS, choose
    from ssdtune.schedule.plan import Budgets
    from ssdtune.swap.storage import BufferedStorage
    from ssdtune.visit.draft import Options

    offload = source.config.offload
    is_here = source.model is None and not source.on_device
    return Options(
        device=torch.device("cuda" if source.on_device else "cpu"),
        budgets=Budgets(ram_bytes=0),
        storage=choose(offload.storage, meta.checkpoint.files) if is_here else BufferedStorage(),
        chunk_tokens=offload.loss_chunk_tokens or DEFAULT_CHUNK_TOKENS,
    )


def _resident_bytes(meta: MetaModel, streamed: set[str]) -> int:
    """Parameters and buffers outside of blocks."""
    parameters = meta.model.named_parameters()
    outside = sum(p.nbytes for name, p in parameters if name not in streamed)
    return outside + sum(b.nbytes for b in meta.model.buffers())


def _rows(source: Source, meta: MetaModel) -> tuple[Rows, list[int], int]:
    """Counted, or estimated from the first SAMPLE_ROWS, their lengths, and the texts that one becomes in a micro-batch;
    without data every row is as long as may be."""
    config = source.config
    if not source.has_data:
        length = config.max_length
        rows = Rows(
            num=0,
            mean_tokens=length,
            padded_tokens=length,
            longest=length,
            trained_share=1.0,
            is_estimate=True,
        )
        return rows, [], 1
    from ssdtune.data import load_dataset_rows, tokenize_rows
    from ssdtune.trainer.rows import load_tokenizer

    opened = [load_dataset_rows(entry) for entry in config.dataset]
    num_rows = sum(len(rows) for rows in opened)
    sample = [rows.first(SAMPLE_ROWS) for rows in opened]
    tokenizer = load_tokenizer(config, meta.folder)
    tokenized = tokenize_rows(
        sample,
        tokenizer,
        max_length=config.max_length,
        overlong=config.overlong,
        train_on=config.train_on,
        chat_template=config.chat_template,
    )
    num_sampled = sum(len(rows) for rows in sample)
    entries = tokenized.entries or (tokenized.stats,)
    # Rows of each data set that would be kept, by those that were looked at.
    nums = [
        stats.num_rows * len(whole) / len(rows)
        for stats, whole, rows in zip(entries, opened, sample, strict=True)
    ]
    lengths = _lengths(tokenized, nums)
    rows = Rows(
        num=round(sum(nums)),
        mean_tokens=statistics.mean(lengths),
        padded_tokens=statistics.mean(lengths),
        longest=tokenized.stats.longest_row,
        trained_share=_trained_share(entries, nums),
        is_estimate=num_sampled < num_rows,
    )
    return rows, lengths, tokenized.sequences_per_row


def _lengths(tokenized: Tokenized, nums: Sequence[float]) -> list[int]:
    """Tokens of the rows that were looked at; of several data sets each its share, shuffled as a run shuffles them.
    nums: rows that each has."""
    lengths = tokenized.lengths(len(tokenized))
    if not tokenized.entries:
        return lengths
    counts = [stats.num_rows for stats in tokenized.entries]
    ends = itertools.accumulate(counts)
    each = [lengths[end - num : end] for end, num in zip(ends, counts, strict=True)]
    mixed = in_proportion(each, nums)
    random.Random(0).shuffle(mixed)
    return mixed


def _trained_share(entries: Sequence[DataStats], nums: Sequence[float]) -> float:
    """Of the tokens of so many rows of each data set."""
    weighed = [(num / stats.num_rows, stats) for num, stats in zip(nums, entries, strict=True)]
    trained = sum(weight * stats.num_trained_tokens for weight, stats in weighed)
    return trained / sum(weight * stats.num_tokens for weight, stats in weighed)
