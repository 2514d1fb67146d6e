"""A machine's profile: curves, costs, what is refused."""

import copy
import dataclasses
from typing import Any

import pytest
import yaml

from ssdtune.schedule.choices import Request
from ssdtune.schedule.cost import Moves, Operator, Pricing, StepWork, Work, missed_steps
from ssdtune.schedule.curve import Curve, ProfileError
from ssdtune.schedule.plan import BlockShape, Budgets, Direction, Kind, Lane
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.schedule.profile import OPERATORS, PERTURB, Profile
from ssdtune.schedule.saved_profile import profile_from

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
NEWER: dict[str, Any] = {
    "decoding": {"decode": {"wide": 2.5, "rotated": 8.0}},
    "products": {"float32": {"matmul": {1: [[2e6, 0.4, 0.5]], 16: [[3.2e7, 0.9, 1.2]]}}},
    "optimizer": {"fused": [[1e6, 1e-2, 2e-2]]},
    "busy_cores": 0.5,
    "copy_overlap": 1.25,
    "device_bytes": 22 * 10**9,
}


def test_a_profile_survives_its_file() -> None:
    for content in (GOOD, {**GOOD, **NEWER}):
        profile = profile_from(content, "profile.yaml")
        text = yaml.safe_dump(profile.to_mapping())
        assert profile_from(yaml.safe_load(text), "again") == profile


def test_an_older_profile_is_read_and_says_what_it_lacks() -> None:
    older, newer = profile_from(GOOD, "p"), profile_from({**GOOD, **NEWER}, "p")
    assert older.lacks == [
        "products of few tokens with large matrices",
        "perturbing weights",
        "decoding by kinds of packed weights",
        "reading and writing at once",
        "the optimizer on the CPU",
        "copying in RAM beside compute",
    ]
    assert newer.lacks == ["perturbing weights", "reading and writing at once"]
    assert Operator(PERTURB, 1e6).seconds(older, "float32") == 0.0
    assert older.few_rows_s("float32", "matmul", 2e6, 1) is None
    assert not older.has_p90


def test_a_product_of_few_rows_with_a_large_matrix_is_not_priced_by_its_flop() -> None:
    profile = profile_from({**GOOD, **NEWER}, "p")
    by_flop = Operator("matmul", 3.2e7).seconds(profile, "float32")
    assert by_flop == pytest.approx(0.32)
    assert Operator("matmul", 3.2e7, 4e6, 16).seconds(profile, "float32") == pytest.approx(0.9)
    assert Operator("matmul_transposed", 3.2e7, 0.0, 16).seconds(profile, "float32") == by_flop


def test_a_machine_at_its_slow_end_has_the_same_curves_slower() -> None:
    content = {**GOOD, "transfers": {"nvme_read": [[1e6, 1e-3, 2e-3], [1e7, 5e-3, 7e-3]]}}
    slow = profile_from({**content, **NEWER}, "p").at_p90
    assert slow.transfer("nvme_read").seconds(1e7) == 7e-3
    assert slow.few_rows_s("float32", "matmul", 3.2e7, 16) == pytest.approx(1.2)
    assert slow.operator("float32", "matmul").seconds(1000) == 1e-5, "not known: the middle"


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
        (("busy_cores",), "many", "busy_cores"),
        (("copy_overlap",), 2.5, "copy_overlap is 2.5; it is from 1"),
        (("copy_overlap",), "some", "copy_overlap"),
        (("decoding",), {"decode": {"wide": 0}}, "decoding.decode.wide is 0; it is a number"),
        (("decoding",), {"decode": 2}, "decoding.decode"),
        (("device_bytes",), 22, "device_bytes: 22 has no unit"),
        (("products",), [1], "products"),
        (("products",), {"float32": {"matmul": {"few": [[1, 1]]}}}, "'few' is no number of rows"),
        (("products",), {"float32": {"matmul": {16: [[1, 0]]}}}, "products.float32.matmul.16"),
        (("optimizer",), {"fused": []}, "optimizer.fused"),
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


def test_a_format_that_was_not_measured_goes_by_a_near_ones_rates() -> None:
    """float16 as bfloat16, else as float32; bfloat16 as nothing else."""
    profile = profile_from({**GOOD, **NEWER, "in_model": {"float32": {"factor": 3.0}}}, "p")
    for op in (Operator("matmul", 1000.0), Operator("matmul", 3.2e7, 4e6, 16)):
        work = Work({op: 2})
        assert work.seconds(profile, "float16") == work.seconds(profile, "float32") > 0
    assert profile.assumed_of("float16") == ("float16 as fast as float32, which was measured",)
    assert profile.assumed_of("float32") == ()
    faster = {kind: Curve(((1.0, 1e-12),)) for kind in OPERATORS}
    both = {**profile.operators, "bfloat16": faster}
    wide = dataclasses.replace(profile, operators=both)
    assert wide.operator("float16", "matmul") is faster["matmul"]
    assert "as fast as bfloat16" in wide.assumed_of("float16")[0]
    three = dataclasses.replace(profile, operators={**both, "float16": dict(faster)})
    assert three.assumed_of("float16") == ()


def test_under_autocast_products_go_by_its_format_and_all_else_by_the_weights() -> None:
    emulated = {kind: Curve(((1.0, 1e-6), (1e9, 1e3))) for kind in OPERATORS}
    plain = profile_from({**GOOD, **NEWER, "in_model": {"float32": {"factor": 3.0}}}, "p")
    both = dataclasses.replace(plain, operators={**plain.operators, "bfloat16": emulated})
    product, few, passes = (
        Operator("matmul", 1000.0),
        Operator("matmul", 3.2e7, 4e6, 16),
        Operator("pointwise", 1000.0),
    )

    def seconds(op: Operator, autocast: str | None) -> float:
        work = StepWork(
            passes={"train": {(0, Direction.FORWARD): [Work({op: 1})]}},
            between=Work({}),
            dtype="float32",
            autocast=autocast,
        )
        blocks = (BlockShape(name="a", slot_bytes=10**6, file_bytes=10**6),)
        orders = {"train": [(0, Direction.FORWARD)]}
        plan = make_plan(Request(blocks=blocks, orders=orders, budgets=Budgets(ram_bytes=10**6)))
        return Pricing(work, both, num_micro_batches=1).simulation(plan).busy_s[Lane.COMPUTE]

    for op in (product, few):
        cast_s = 3 * Work({op: 1}).curves_s(both, "bfloat16")
        assert seconds(op, "bfloat16") == pytest.approx(cast_s, rel=0.01)
        assert seconds(op, None) == pytest.approx(3 * op.seconds(both, "float32"), rel=0.01)
    assert seconds(passes, "bfloat16") == seconds(passes, None)
    with pytest.raises(ProfileError, match=r"operators\.bfloat16\.matmul"):
        plain.under_autocast("float32", "bfloat16")


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


@pytest.mark.parametrize("overlap", [1.0, 1.25, 2.0, None])
@pytest.mark.parametrize("visit_s", [1e-5, 3e-4])
def test_copies_and_compute_on_one_processor_take_what_both_together_need(
    overlap: float | None, visit_s: float
) -> None:
    """Copies of 0.1 ms beside compute that is shorter, or longer."""
    shapes = tuple(
        BlockShape(name=name, slot_bytes=10**6, file_bytes=10**6, is_staged=True) for name in "abcd"
    )
    plan = make_plan(
        Request(blocks=shapes, orders=plain_orders(4), budgets=Budgets(ram_bytes=3 * 10**6))
    )
    one = Work({Operator("matmul", 1000.0): round(visit_s / 1e-5)})
    passes = {(i, d): [one] for i in range(4) for d in Direction}
    work = StepWork(passes={"train": passes}, between=Work({}), dtype="float32")
    profile = dataclasses.replace(profile_from(GOOD, "p"), reading_takes=0.0, copy_overlap=overlap)
    steps = plan.sequences["train"]
    seconds = Pricing(work, profile, num_micro_batches=1).op_seconds(steps)
    for direction in Direction:
        copies, visits = (
            [op.id for op in steps.ops if op.lane is lane and op.direction is direction]
            for lane in (Lane.CPU, Lane.COMPUTE)
        )
        assert copies
        less, more = sorted((1e-4 * len(copies), visit_s * len(visits)))
        both = more if overlap is None else 2 * less / overlap + more - less
        taken = [sum(seconds[i] for i in lane) for lane in (copies, visits)]
        assert max(taken) == pytest.approx(both)


def test_what_a_device_decodes_has_a_curve_of_its_own() -> None:
    """Behind its upload, or where cuFile brought the packed bytes; older profiles take a copy's time."""
    shapes = tuple(
        BlockShape(
            name=name, slot_bytes=4 * 10**6, file_bytes=10**6, is_staged=True, is_packed=True
        )
        for name in "abc"
    )
    curves = {"nvme_read": 1e-3, "h2d": 2e-3, "d2d": 4e-6, "device_decode": 7e-3}
    profile = Profile(
        name="a device",
        operators={},
        transfers={name: Curve(((1e6, seconds),)) for name, seconds in curves.items()},
    )
    work = StepWork(passes={"train": {}}, between=Work({}), dtype="float32")

    def found(profile: Profile, *, in_buffers: bool) -> dict[Lane, float]:
        plan = make_plan(
            Request(
                blocks=shapes,
                orders=plain_orders(3),
                budgets=Budgets(ram_bytes=2 * 10**6, device_bytes=10**7),
                on_device=True,
                buffers_on_device=in_buffers,
            )
        )
        steps = plan.sequences["train"]
        seconds = Pricing(work, profile, num_micro_batches=1).op_seconds(steps)
        moved = zip(steps.ops, seconds, strict=True)
        return {op.lane: s for op, s in moved if op.kind in (Kind.UPLOAD, Kind.DECODE)}

    decode_s = 4 * 7e-3
    assert found(profile, in_buffers=False)[Lane.H2D] == pytest.approx(2e-3 + decode_s)
    assert found(profile, in_buffers=True).get(Lane.DEVICE_COPY) == pytest.approx(decode_s)
    del curves["device_decode"]
    older = Profile(
        name="older",
        operators={},
        transfers={name: Curve(((1e6, seconds),)) for name, seconds in curves.items()},
    )
    assert found(older, in_buffers=False)[Lane.H2D] == pytest.approx(2e-3 + 4 * 4e-6)


@pytest.mark.parametrize("on_device", [False, True])
def test_each_kind_of_packed_weights_decodes_at_its_own_rate(on_device: bool) -> None:
    """Of a block some may be narrow codes: the curve as it is. In an older profile all are."""
    num_bytes = 4 * 10**6
    block = BlockShape(
        name="a", slot_bytes=num_bytes, file_bytes=10**6, is_staged=True, is_packed=True
    )
    shapes = (
        block,
        dataclasses.replace(block, name="b", decoding=(("wide", num_bytes),)),
        dataclasses.replace(
            block, name="c", decoding=(("rotated", num_bytes // 2), ("wide", num_bytes // 4))
        ),
        dataclasses.replace(block, name="d", decoding=(("never measured", num_bytes),)),
    )
    name = "device_decode" if on_device else "decode"
    profile = profile_from(
        {
            **GOOD,
            "transfers": {
                "nvme_read": [[1e6, 1e-3]],
                "h2d": [[1e6, 1e-9]],
                name: [[1e6, 1e-3], [1e7, 1e-2]],
            },
            "decoding": {name: {"wide": 2.5, "rotated": 8.0}},
        },
        "p",
    )
    budgets = Budgets(ram_bytes=9 * 10**6, device_bytes=10**7 if on_device else 0)
    steps = make_plan(
        Request(blocks=shapes, orders=plain_orders(4), budgets=budgets, on_device=on_device)
    ).sequences["train"]
    work = StepWork(passes={"train": {}}, between=Work({}), dtype="float32")

    def decoding_s(profile: Profile) -> dict[str, float]:
        seconds = Pricing(work, profile, num_micro_batches=1).op_seconds(steps)
        kinds = (Kind.UPLOAD, Kind.DECODE)
        pairs = zip(steps.ops, seconds, strict=True)
        return {op.block: s for op, s in pairs if op.kind in kinds}

    shares = {"a": 1.0, "b": 2.5, "c": 0.5 * 8 + 0.25 * 2.5 + 0.25, "d": 1.0}
    expected = {block: pytest.approx(4e-3 * share, rel=1e-4) for block, share in shares.items()}
    assert decoding_s(profile) == expected
    older = dataclasses.replace(profile, decoding={})
    assert decoding_s(older) == dict.fromkeys(shares, pytest.approx(4e-3, rel=1e-4))
    in_compute = Operator(f"{name}:rotated", 1e6).seconds(profile, "float32")
    assert in_compute == pytest.approx(8e-3), "where blocks stay packed in their slots"


def test_variants_and_missed_steps_of_weights_take_their_time_in_a_forward_step() -> None:
    kinds = dict.fromkeys(OPERATORS, Curve(((1.0, 1e-9),)))
    profile = Profile(
        name="made up",
        operators={"float32": {**kinds, PERTURB: Curve(((1e6, 1e-2),))}},
        transfers={"nvme_read": Curve(((1e6, 1e-3),))},
    )
    shapes = tuple(BlockShape(name=n, slot_bytes=10**6, file_bytes=10**6) for n in "abcd")
    plan = make_plan(
        Request(blocks=shapes, orders=plain_orders(4), budgets=Budgets(ram_bytes=3 * 10**6))
    )
    one = Work({Operator(PERTURB, 1e6): 1})
    work = StepWork(
        passes={kind: {} for kind in ("forward", "train")},
        between=Work({}),
        dtype="float32",
        moves=Moves(
            shifts={b: Work({Operator(PERTURB, 1e6): 2}) for b in range(4)},
            updates=dict.fromkeys(range(4), one),
            num_missed=5.5,
        ),
    )

    def compute(kind: str) -> list[tuple[bool, float]]:
        steps = plan.sequences[kind]
        seconds = Pricing(work, profile, kind=kind, num_micro_batches=8).op_seconds(steps)
        return [
            (steps.visits[op.visit].is_filled_for, s)
            for op, s in zip(steps.ops, seconds, strict=True)
            if op.kind is Kind.COMPUTE
        ]

    found = dict(compute("forward"))
    assert found[True] == pytest.approx(2e-2 + 5.5e-2), "two variants, and what it has missed"
    assert found.get(False, 3e-2) == pytest.approx(3e-2), "one that stayed missed one step"
    assert {s for _, s in compute("train")} == {0.0}, "gradients move no weights on their way"


def test_a_block_has_missed_half_of_the_way_to_its_next_copy() -> None:
    assert missed_steps(1000, 10) == 5.5
    assert missed_steps(21, 0) == 10
    assert missed_steps(5, 10) == 2, "the run ends before there is a copy"
