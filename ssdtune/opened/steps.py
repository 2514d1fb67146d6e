"""What the configuration's method makes of a step: blocks as slots hold them, and zeroth-order training's moves."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssdtune.jobs import opens_directions
from ssdtune.schedule.cost import Work
from ssdtune.schedule.job import Directions

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig
    from ssdtune.jobs import Source
    from ssdtune.schedule.cost import Moves
    from ssdtune.schedule.plan import BlockShape
    from ssdtune.swap.recipe import BlockRecipe
    from ssdtune.visit.draft import Draft


def blocks_of(source: Source, drafted: Draft) -> tuple[BlockShape, ...]:
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


@dataclasses.dataclass(frozen=True)
class Steps:
    """What the method makes of a step."""

    words: str
    kind: str = "train"
    variants: int = 1
    fold_steps: int = 0
    more: dict[str, int] = dataclasses.field(default_factory=dict)
    moves: Moves | None = None


def steps_of(source: Source, drafted: Draft, adapter: list[Any], outside_bytes: int) -> Steps:
    """adapter: its parameters, all inside blocks. outside_bytes: of what else is moved and lies in memory."""
    config = source.config
    words = f"{'DoRA' if config.use_dora else 'LoRA'} r{config.lora_r}"
    if config.method != "zo":
        return Steps(words)
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
    return Steps(
        words=f"{type(estimator).__name__} over {places.get(config.zo_trains, words)}",
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


def directions_of(
    source: Source, steps: Steps, drafted: Draft, adapter: list[Any], outside_bytes: int
) -> Directions | None:
    """Those of steps whose number of directions is open, and what one more takes: the rest as `steps_of` has it."""
    if not opens_directions(source.config):
        return None
    num = steps.variants - 1  # FZOO's, beside the weights as they are
    config = dataclasses.replace(source.config, zo_num_directions=num + 1)
    more = steps_of(dataclasses.replace(source, config=config), drafted, adapter, outside_bytes)
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
