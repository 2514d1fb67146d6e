"""A machine's profile: curves, costs, what is refused."""

import copy
from typing import Any

import pytest
import yaml

from ssdtune.schedule.cost import Operator, Pricing, StepWork, Work
from ssdtune.schedule.curve import Curve, ProfileError, curve_of
from ssdtune.schedule.plan import BlockShape, Budgets, Direction, Kind, Lane
from ssdtune.schedule.planner import Request, make_plan, plain_orders
from ssdtune.schedule.profile import OPERATORS, Profile, profile_from

GOOD: dict[str, Any] = {
    "name": "a machine",
    "operators": {"float32": {kind: [[100, 1e-6], [1000, 1e-5]] for kind in OPERATORS}},
    "transfers": {
        "nvme_read": [[1e6, 1e-3], [1e7, 5e-3]],
        "nvme_write": [[1e6, 2e-3]],
        "unpack": [[1e6, 1e-4]],
    },
    "reading_takes": 1e-12,
}


def test_a_curve_is_straight_between_what_was_measured() -> None:
    curve = Curve(((10.0, 1.0), (20.0, 2.0), (40.0, 3.0)))
    assert curve.seconds(0) == 0
    assert curve.seconds(1) == 1.0, "latency"
    assert curve.seconds(15) == pytest.approx(1.5)
    assert curve.seconds(30) == pytest.approx(2.5)
    assert curve.seconds(80) == pytest.approx(6.0), "the last rate goes on"
    assert curve.rate == pytest.approx(40 / 3)


def test_noise_does_not_make_larger_work_faster() -> None:
    assert curve_of([(30, 2.0), (10, 1.0), (20, 2.5)]).points == ((10, 1.0), (20, 2.5), (30, 2.5))


def test_a_profile_survives_its_file() -> None:
    profile = profile_from(GOOD, "profile.yaml")
    text = yaml.safe_dump(profile.to_mapping())
    assert profile_from(yaml.safe_load(text), "again") == profile


@pytest.mark.parametrize(
    ("path", "value", "names"),
    [
        ((), [1, 2], "must be a mapping"),
        (("operators",), {}, "operators"),
        (("operators", "float32", "matmul"), [], "operators.float32.matmul"),
        (("operators", "float32", "matmul"), [[100, 0]], "all above 0"),
        (("operators", "float32", "matmul"), [[100, 1], [100, 2]], "don't rise"),
        (("operators", "float32", "matmul"), [[100, float("nan")]], "operators.float32.matmul"),
        (("transfers", "nvme_read"), "fast", "transfers.nvme_read"),
        (("transfers", "nvme_read"), [[True, 1]], "transfers.nvme_read"),
        (("reading_takes",), -1, "reading_takes"),
        (("speed",), 3, "speed"),
    ],
)
def test_a_bad_profile_is_refused_by_entry(path: tuple[str, ...], value: Any, names: str) -> None:
    content = copy.deepcopy(GOOD)
    if not path:
        content = value
    else:
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    with pytest.raises(ProfileError, match=r"(?s)p\.yaml.*") as caught:
        profile_from(content, "p.yaml")
    assert names in str(caught.value)


def test_a_rate_that_is_missing_is_named_when_it_is_needed() -> None:
    profile = profile_from(GOOD, "p")
    with pytest.raises(ProfileError, match=r"transfers\.h2d"):
        profile.transfer("h2d")
    with pytest.raises(ProfileError, match=r"operators\.bfloat16\.matmul"):
        profile.operator("bfloat16", "matmul")


def test_ops_take_what_their_work_takes_on_this_machine() -> None:
    profile = profile_from(GOOD, "p")
    shapes = tuple(
        BlockShape(name=f"layers.{i}", slot_bytes=10**6, file_bytes=10**7) for i in range(4)
    )
    plan = make_plan(
        Request(blocks=shapes, orders=plain_orders(4), budgets=Budgets(ram_bytes=2 * 10**6))
    )
    forward = Work({Operator("matmul", 1000.0): 3, Operator("pointwise", 100.0): 2})
    backward = Work({Operator("matmul", 100.0, 1000.0): 1})
    passes = {
        (i, d): [w]
        for i in range(4)
        for d, w in ((Direction.FORWARD, forward), (Direction.BACKWARD, backward))
    }
    work = StepWork(passes={"train": passes}, between=Work({}), dtype="float32")
    seconds = Pricing(work, profile, num_micro_batches=2).op_seconds(plan.sequences["train"])
    ops = plan.sequences["train"].ops
    compute = [s for op, s in zip(ops, seconds, strict=True) if op.kind is Kind.COMPUTE]
    loads = [s for op, s in zip(ops, seconds, strict=True) if op.kind is Kind.LOAD]
    assert set(loads) == {5e-3}
    alone = 4 * 2 * (3.2e-5 + 1e-5)
    factor = 1 + 1e-12 * 10**7 * len(loads) / alone
    assert compute[0] == pytest.approx(2 * 3.2e-5 * factor)
    assert compute[-1] == pytest.approx(2 * 1e-5 * factor), "its bytes are longer than its FLOP"
    assert forward.flop == 3000


def test_a_copy_within_a_device_has_a_curve_of_its_own() -> None:
    """Neither the link's nor the CPU's; a profile that lacks it says so."""
    shapes = tuple(
        BlockShape(name=f"layers.{i}", slot_bytes=10**6, file_bytes=10**6) for i in "abc"
    )
    plan = make_plan(
        Request(
            blocks=shapes,
            orders=plain_orders(3),
            budgets=Budgets(ram_bytes=10**6, device_bytes=2 * 10**6),
            on_device=True,
            buffers_on_device=True,
        )
    )
    names = {"nvme_read": 5e-3, "h2d": 1e-3, "unpack": 7.0, "d2d": 2e-5}
    curves = {name: Curve(((1e6, seconds),)) for name, seconds in names.items()}
    work = StepWork(passes={"train": {}}, between=Work({}), dtype="float32")
    profile = Profile(name="a device", operators={}, transfers=curves)
    steps = plan.sequences["train"]
    seconds = Pricing(work, profile, num_micro_batches=1).op_seconds(steps)
    found = {op.lane: s for op, s in zip(plan.sequences["train"].ops, seconds, strict=True)}
    assert found == {
        Lane.NVME_READ: 5e-3,
        Lane.DEVICE_COPY: 2e-5,
        Lane.H2D: 1e-3,
        Lane.COMPUTE: 0.0,
    }
    del curves["d2d"]
    with pytest.raises(ProfileError, match=r"transfers\.d2d is missing"):
        Pricing(work, profile, num_micro_batches=1).op_seconds(steps)
