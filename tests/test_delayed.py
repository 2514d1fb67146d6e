"""How many blocks of full fine-tuning are updated in the next forward, against all numbers of them."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from test_outlook import DUPLEX, GB, TFLOP

from ssdtune.schedule import delayed as delayed_module
from ssdtune.schedule.decisions import Full, Shape, gpt_shape
from ssdtune.schedule.delayed import best_delayed
from ssdtune.schedule.grid import WORTH
from ssdtune.schedule.outlook import Outlook, Rates, foresee_full
from ssdtune.schedule.plan import Tier


def anything(outlook: Outlook) -> bool:
    return True


def of_all_numbers(shape: Shape, decision: Full, rates: Rates) -> list[Outlook]:
    num = shape.num_blocks
    shares = [k / num for k in range(num + 1)]
    kept = [name for name in Full.__slots__ if name != "delayed_share"]
    same: dict[str, Any] = {name: getattr(decision, name) for name in kept}
    return [foresee_full(shape, Full(delayed_share=s, **same), rates) for s in shares]


@pytest.mark.parametrize("seed", range(12))
def test_small_models_delay_as_brute_force_would(seed: int) -> None:
    chance = random.Random(seed)
    tokens = chance.choice((2048, 8192, 32768))
    shape = gpt_shape(chance.randint(4, 14), 4096, tokens, num_micro_batches=chance.randint(1, 2))
    decision = Full(states=chance.choice((Tier.NVME, Tier.RAM)))
    rates = Rates(
        flops=150 * TFLOP,
        h2d=25 * GB,
        d2h=25 * GB,
        read=chance.uniform(3, 14) * GB,
        write=chance.uniform(2, 10) * GB,
        update=chance.uniform(1, 4) * GB,
        is_drive_shared=chance.random() < 0.7,
        drive_overlap=chance.uniform(1.0, 2.0),
    )
    found, outlook = best_delayed(shape, decision, rates, anything)
    fastest = min(each.step_s for each in of_all_numbers(shape, decision, rates))
    assert outlook.step_s <= 1.01 * fastest / (1 - WORTH)
    assert outlook == foresee_full(shape, found, rates)


def test_the_best_share_lies_between_none_and_all_where_the_drive_is_the_limit() -> None:
    """A sixth of 175B with few sequences."""
    shape = gpt_shape(16, 12288, 16 * 1024)
    found, outlook = best_delayed(shape, Full(), DUPLEX, anything)
    steps = of_all_numbers(shape, Full(), DUPLEX)
    assert 0.1 < found.delayed_share < 0.6
    assert outlook.step_s < 0.95 * steps[0].step_s
    assert outlook.step_s < 0.95 * steps[-1].step_s
    assert outlook.memory.ram > steps[0].memory.ram, "their gradients wait"


def test_ram_bounds_the_gradients_that_wait() -> None:
    shape = gpt_shape(16, 12288, 16 * 1024)
    free, _ = best_delayed(shape, Full(), DUPLEX, anything)
    none = foresee_full(shape, Full(), DUPLEX).memory.ram
    room = (
        none + 1.5 * 2 * shape.block_parameters
    )  # two bytes of each gradient, of a block and a half
    found, outlook = best_delayed(shape, Full(), DUPLEX, lambda each: each.memory.ram <= room)
    assert round(found.delayed_share * 16) == 1 < round(free.delayed_share * 16)
    assert outlook.memory.ram <= room


@pytest.mark.parametrize(
    ("tokens", "rates", "fits"),
    [
        (2**21, dataclasses.replace(DUPLEX, flops=10 * TFLOP, read=500 * GB, write=500 * GB), True),
        (2048, dataclasses.replace(DUPLEX, is_drive_shared=True), True),
        (2048, DUPLEX, False),
    ],
    ids=["compute", "drive", "no room"],
)
def test_where_nothing_can_be_gained_one_step_is_simulated(
    tokens: int, rates: Rates, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is compute, or the drive is busy from end to end, or there is no room for it at all."""
    tried: list[float] = []

    def counted(shape: Shape, decision: Full, rates: Rates) -> Outlook:
        tried.append(decision.delayed_share)
        return foresee_full(shape, decision, rates)

    monkeypatch.setattr(delayed_module, "foresee_full", counted)
    found, _ = best_delayed(gpt_shape(12, 4096, tokens), Full(), rates, lambda each: fits)
    assert found.delayed_share == 0
    assert tried == [0]


def test_few_steps_are_simulated_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def counted(shape: Shape, decision: Full, rates: Rates) -> Outlook:
        tried.append(decision.delayed_share)
        return foresee_full(shape, decision, rates)

    monkeypatch.setattr(delayed_module, "foresee_full", counted)
    best_delayed(gpt_shape(96, 12288, 8 * 1024), Full(), DUPLEX, anything)
    assert 1 < len(tried) <= 12
