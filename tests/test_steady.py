"""What is measured while the machine is slow is measured again, within a limit; and it is waited for."""

from collections.abc import Iterator

import pytest
import torch

from ssdtune.probe import steady
from ssdtune.probe.steady import look, pace, steadily, usual_pace, watching

CPU = torch.device("cpu")


class Machine:
    """Whose product takes what it is told to, from one look to the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1e-3
        self.slept = 0.0
        monkeypatch.setattr(steady, "FIRST_LOOKS_S", 1e-3)
        monkeypatch.setattr(steady.Watch, "_seconds", lambda watch: self.seconds)
        monkeypatch.setattr(steady, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.slept += seconds
        if self.slept > 1:
            self.seconds = 1e-3


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def measured(machine: Machine, paces: Iterator[float]) -> float:
    """A measurement during which the machine is so slow, from its first look to its last."""
    machine.seconds = next(paces)
    look()
    pace, machine.seconds = machine.seconds, 1e-3
    return pace


def test_what_was_slow_is_measured_again(slow_machine: Machine) -> None:
    paces = iter((1.5e-3, 1.3e-3, 1.05e-3, 1e-3))
    with watching(CPU):
        assert steadily(lambda: measured(slow_machine, paces)) == 1.05e-3
    assert next(paces) == 1e-3, "once it is steady enough, not again"


def test_the_least_slow_counts_where_none_is_steady(
    slow_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steady, "perf_counter", iter(range(1000)).__next__)
    monkeypatch.setattr(steady, "AGAIN_S", 5)  # a look takes a second here, too
    paces = iter((1.5e-3, 1.3e-3, 1.4e-3, 1e-3))
    with watching(CPU):
        assert steadily(lambda: measured(slow_machine, paces)) == 1.3e-3
        assert next(paces) == 1e-3
        assert steadily(lambda: measured(slow_machine, iter((2e-3,)))) == 2e-3, "no time is left"


def test_a_slow_machine_is_waited_for(slow_machine: Machine) -> None:
    with watching(CPU):
        slow_machine.seconds = 2e-3
        assert steadily(lambda: measured(slow_machine, iter((1e-3,)))) == 1e-3
    assert slow_machine.slept > 1


def test_nothing_is_watched_unless_it_is_asked_for(slow_machine: Machine) -> None:
    paces = iter((9e-3, 1e-3))
    assert steadily(lambda: measured(slow_machine, paces)) == 9e-3


def test_a_real_product_takes_time() -> None:
    watch = steady.Watch(CPU)
    watch.look()
    assert 0 < watch._least < 1


def test_times_of_compute_are_told_at_one_pace(slow_machine: Machine) -> None:
    with watching(CPU):
        told: list[float] = []
        for slowness in (1.0, 1.5, 0.8, 1.2, 1.0):
            slow_machine.seconds = 1e-3 * slowness
            told.append(3e-3 * slowness / pace())
        assert told == pytest.approx([3e-3] * 5)


def test_another_process_is_no_pace(slow_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(CPU):
        looks = iter([50e-3] * steady.TIMES + [1.2e-3] * steady.TIMES + [50e-3] * 99)
        monkeypatch.setattr(steady.Watch, "_seconds", lambda watch: next(looks))
        assert pace() == pytest.approx(1.2), "looked at again"
        assert pace() == pytest.approx(steady.DISTURBED), "at most"


def test_the_usual_pace_is_that_of_the_middle_second(
    slow_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watching(CPU):
        for second, slowness, num_looks in ((1, 1.0, 9), (2, 2.0, 1), (3, 2.5, 1)):
            monkeypatch.setattr(steady, "perf_counter", lambda second=second: float(second))
            slow_machine.seconds = 1e-3 * slowness
            for _ in range(num_looks):
                look()
        watch = steady._watch.get()
        assert watch is not None
        watch._of_second = {k: v for k, v in watch._of_second.items() if k in (1, 2, 3)}
        assert usual_pace() == pytest.approx(2.0), "however often it was looked at in the others"
    assert usual_pace() == pace() == 1.0, "nothing is watched"
