"""What predictions count of a zeroth-order step's perturbing is what a step does."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import cut, make_pair, with_lora

from ssdtune.kernels.noise import GAUSSIAN, PART
from ssdtune.schedule.cost import Moves
from ssdtune.schedule.profile import PERTURB, PERTURB_SIGNS
from ssdtune.zeroth_order import FZOO, LOZO, MeZO, ZerothOrder
from ssdtune.zeroth_order import updates as updates_module
from ssdtune.zeroth_order.rules import Rule
from ssdtune.zeroth_order.work import moves_of

Stream = Callable[..., Any]


def step(method: ZerothOrder, seed: int) -> None:
    calls = [
        lambda p=piece: method.model(**p)
        for piece in cut(tiny_models.batch("llama", 4, 12, seed=seed), 2)
    ]
    method.step(calls, learning_rate=1e-2)


def predicted(moves: Moves, method: ZerothOrder) -> Counter[str]:
    """Elements by kind in one step: shifts at every visit, what a filled block has missed, a step for one that stays."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for visit in method.streamer.engine.plan.sequences["forward"].visits:
        num = moves.num_missed if visit.is_filled_for else float(visit.block not in seen)
        seen.add(visit.block)
        for works, times in ((moves.shifts, 1), (moves.updates, num)):
            if visit.block in works:
                for op, n in works[visit.block].operators.items():
                    counts[op.kind] += round(times * n * op.size)
    return counts


@pytest.mark.parametrize("adapts", [False, True])
@pytest.mark.parametrize("name", ["mezo", "fzoo"])
def test_the_elements_that_move_are_those_predicted(
    name: str, adapts: bool, tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = {"mezo": MeZO(num_directions=2), "fzoo": FZOO(num_directions=3)}[name]
    pair = make_pair("llama", tmp_path, stream, adapt=with_lora if adapts else lambda model: model)
    method = ZerothOrder(pair.streamed, estimator, seed=3)
    step(method, 0)
    step(method, 1)
    moved: Counter[str] = Counter()
    plain = updates_module.add_directions

    def counting(to: torch.Tensor, base: torch.Tensor, directions: Any, **more: Any) -> None:
        for direction in directions:
            moved[PERTURB if direction.kind == GAUSSIAN else PERTURB_SIGNS] += base.numel()
        plain(to, base, directions, **more)

    monkeypatch.setattr(updates_module, "add_directions", counting)
    taken = method.weights.take  # adapters take their update between steps: not in a visit
    monkeypatch.setattr(method.weights, "take", lambda update: None if adapts else taken(update))
    step(method, 2)
    moves = method.moves(5)
    assert moves.num_missed == 2, "half of the run's five steps; the third has missed two"
    # What lies outside of blocks moves between visits: once for each variant, and in the update.
    outside = sum(p.numel() for p in method.weights.residents.outside.values())
    num_shifts = sum(shift is not None for shift in estimator.variants)
    wanted = predicted(moves, method)
    wanted[next(iter(wanted))] += outside * (num_shifts + estimator.num_directions)
    assert moved == wanted
    assert sum(moved.values()) > 0


def test_updates_cost_what_their_rule_makes_again() -> None:
    def updates_of(rule: Rule) -> dict[tuple[str, float], int]:
        moves = moves_of({0: [(3 * PART, 2)]}, MeZO(), trains_blocks=True, rule=rule)
        return {(op.kind, op.size): n for op, n in moves.updates[0].operators.items()}

    whole, part = (PERTURB, 6.0 * PART), ("pointwise", 8.0 * PART)
    assert updates_of(Rule()) == {whole: 1}
    assert updates_of(Rule(kind="momentum", beta1=0.9, horizon=5)) == {whole: 5}
    assert updates_of(Rule(kind="sign")) == {whole: 1, part: 6 * (1 + 3)}
    adam = updates_of(Rule(kind="adam", beta1=0.7, beta2=0.9, horizon=5))
    assert adam == {whole: 5, part: 6 * (5 * 6 + 5)}


def test_low_rank_directions_draw_two_vectors_and_add_products() -> None:
    moves = moves_of(
        {0: [(8, 4), (6,)], 1: [(0, 4)]}, LOZO(rank=2, window=3), trains_blocks=True, num_missed=3.0
    )
    assert moves.num_missed == 3.0
    shifts = {(op.kind, op.size): n for op, n in moves.shifts[0].operators.items()}
    assert shifts[PERTURB, 2 * (8 + 4)] == 2
    assert shifts[PERTURB, 6] == 2, "of one dimension: a number for each element"
    assert shifts["pointwise", 8.0 * 8 * 4] == 2, "two variants"
    updates = {(op.kind, op.size): n for op, n in moves.updates[0].operators.items()}
    assert updates[PERTURB, 6] == 1
    assert not moves.shifts[1].operators
