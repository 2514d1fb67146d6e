"""The fluid simulator: the plain one where nothing is shared, by hand where something is, and its invariants."""

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest

from ssdtune.schedule.fluid import simulate_fluid
from ssdtune.schedule.plan import Direction, Kind, Lane, Op, StepPlan
from ssdtune.schedule.simulate import Simulation, simulate


def steps_of(*ops: tuple[Lane, Sequence[int]]) -> StepPlan:
    """Ops with lanes and what they wait for."""
    return StepPlan(
        visits=(),
        ops=tuple(
            Op(
                id=i,
                kind=Kind.COMPUTE if lane is Lane.COMPUTE else Kind.LOAD,
                lane=lane,
                visit=0,
                block=f"b{i}",
                direction=Direction.FORWARD,
                after=tuple(after),
            )
            for i, (lane, after) in enumerate(ops)
        ),
    )


def random_steps(rng: random.Random) -> StepPlan:
    """Any lanes, any waits for ops before, and some for the step before."""
    num_ops = rng.randint(1, 40)
    steps = steps_of(
        *[
            (rng.choice(list(Lane)), rng.sample(range(i), min(i, rng.randint(0, 3))))
            for i in range(num_ops)
        ]
    )
    ops = [
        op._replace(
            direction=rng.choice(list(Direction)),
            after_previous=tuple(rng.sample(range(num_ops), rng.choice((0, 0, 1)))),
        )
        for op in steps.ops
    ]
    return StepPlan(visits=(), ops=tuple(ops))


@pytest.mark.parametrize("seed", range(60))
def test_where_nothing_is_short_it_is_the_plain_simulator(seed: int) -> None:
    rng = random.Random(seed)
    steps = random_steps(rng)
    seconds = [rng.choice((0.0, rng.random())) for _ in steps.ops]
    demands = [{"drive": rng.random()} for _ in steps.ops]
    plenty = {"drive": 100.0, "cores": 1.0}
    between_s = rng.choice((0.0, 0.3))
    expected = simulate(steps, seconds, between_s=between_s)
    found = simulate_fluid(steps, seconds, demands, plenty, between_s=between_s)
    assert found.step_s == pytest.approx(expected.step_s, abs=1e-9)
    assert found.one_pass_s == pytest.approx(expected.one_pass_s, abs=1e-9)
    assert found.two_pass_s == pytest.approx(expected.two_pass_s, abs=1e-9)
    for mine, theirs in zip(found.ops, expected.ops, strict=True):
        assert mine.start_s == pytest.approx(theirs.start_s, abs=1e-9)
        assert mine.end_s == pytest.approx(theirs.end_s, abs=1e-9)


def closed(steps: StepPlan) -> StepPlan:
    """With a last op of compute that waits for all others, and for which all of the next step wait."""
    last = len(steps.ops)
    ops = [op._replace(after_previous=(last,)) for op in steps.ops]
    end = ops[0]._replace(id=last, kind=Kind.COMPUTE, lane=Lane.COMPUTE, after=tuple(range(last)))
    return StepPlan(visits=(), ops=(*ops, end))


def spans(found: Simulation) -> list[tuple[float, float]]:
    return [(round(op.start_s, 9), round(op.end_s, 9)) for op in found.ops]


def test_a_read_and_a_write_take_turns_at_one_drive() -> None:
    """Each alone takes 2 and 4 s; together half as fast until the read ends at 4, then 2 s of the write are left."""
    steps = closed(steps_of((Lane.NVME_READ, ()), (Lane.NVME_WRITE, ())))
    seconds = [2.0, 4.0, 1.0]
    drive = [{"drive": 1.0}, {"drive": 1.0}, {}]
    found = simulate_fluid(steps, seconds, drive, {"drive": 1.0})
    assert spans(found) == [(0.0, 4.0), (0.0, 6.0), (6.0, 7.0)]
    assert found.one_pass_s == pytest.approx(6.0)
    assert found.bound_by is Lane.NVME_WRITE
    assert simulate(steps, seconds).step_s == pytest.approx(5.0)


def test_what_one_cannot_use_goes_to_the_others() -> None:
    """Op 0 is held at half speed by the bus; the drive it leaves alone is op 1's: 1 - 0.5 of it, not half a share of
    op 0's wish. Max-min: op 0 runs at 0.5, op 1 at 0.5 / 0.6."""
    steps = steps_of((Lane.NVME_READ, ()), (Lane.NVME_WRITE, ()), (Lane.COMPUTE, ()))
    demands = [{"bus": 2.0, "drive": 1.0}, {"drive": 0.6}, {}]
    found = simulate_fluid(steps, [3.0, 5.0, 100.0], demands, {"bus": 1.0, "drive": 1.0})
    lengths = [op.end_s - op.start_s for op in found.ops]
    assert lengths == pytest.approx([6.0, 6.0, 100.0])


@pytest.mark.parametrize("seed", range(40))
def test_nothing_takes_more_than_there_is_and_nothing_idles_without_a_reason(seed: int) -> None:
    """Read off the result alone: over the whole step, no lane and no resource does more than it can."""
    rng = random.Random(1000 + seed)
    steps = closed(random_steps(rng))
    seconds = [rng.random() for _ in steps.ops]
    demands = [{r: rng.random() for r in ("drive", "dram") if rng.random() < 0.6} for _ in seconds]
    capacities = {"drive": 0.7, "dram": 0.9}
    found = simulate_fluid(steps, seconds, demands, capacities)
    _check_waits(found)
    assert found.step_s >= found.one_pass_s - 1e-9
    assert found.step_s >= simulate(steps, seconds).step_s - 1e-9
    assert found.step_s <= _one_after_the_other(seconds, demands, capacities) + 1e-9
    for each in found.ops:
        alone = _one_after_the_other([seconds[each.op.id]], [demands[each.op.id]], capacities)
        assert each.end_s - each.start_s >= alone - 1e-9
    for resource, capacity in capacities.items():
        used = sum(d.get(resource, 0.0) * s for d, s in zip(demands, seconds, strict=True))
        assert used <= capacity * found.step_s + 1e-9


def _one_after_the_other(
    seconds: Sequence[float],
    demands: Sequence[Mapping[str, float]],
    capacities: Mapping[str, float],
) -> float:
    slow = [max(1.0, *(d / capacities[r] for r, d in each.items()), 0.0) for each in demands]
    return sum(s * factor for s, factor in zip(seconds, slow, strict=True))


def _check_waits(found: Simulation) -> None:
    by_lane: dict[Lane, list[tuple[float, float]]] = {}
    for each in found.ops:
        by_lane.setdefault(each.op.lane, []).append((each.start_s, each.end_s))
        for other in each.op.after:
            assert each.start_s >= found.ops[other].end_s - 1e-9
    for lane in by_lane.values():
        for (_, end), (start, _) in itertools.pairwise(lane):
            assert start >= end - 1e-9
