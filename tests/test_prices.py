"""What a run costs, and machines beside each other."""

from __future__ import annotations

import dataclasses

import pytest
from test_grid import MB, a_job, a_machine, a_profile

from ssdtune import cli
from ssdtune.machines import devices_known, entries, hardware_lines, machine_from
from ssdtune.planning.prices import Offer, Prices, beside_each_other, cost_line, cost_of
from ssdtune.planning.text import wear_line
from ssdtune.planning.ways import Way
from ssdtune.schedule.machine import Drive
from ssdtune.schedule.outcome import Choices, Outcome, outcome
from ssdtune.schedule.profile import ProfileError
from ssdtune.schedule.saved_profile import profile_from

JOB = a_job(1)
PRICED = dataclasses.replace(
    a_machine(200 * MB, profile=a_profile()),
    price_per_hour=2.0,
    price_source="somebody",
    watts=500.0,
)


def found_on(machine) -> Outcome:
    found = outcome(JOB, machine, Choices(micro_batches=JOB.micro_batches))
    assert isinstance(found, Outcome)
    return found


def test_a_run_costs_its_hours_and_its_energy() -> None:
    found = found_on(PRICED)
    assert found.simulation is not None
    hours = 10 * found.simulation.step_s / 3600
    cost = cost_of(JOB, PRICED, found, Prices(per_kwh=0.3))
    assert cost.rent == pytest.approx(2.0 * hours)
    assert cost.energy == pytest.approx(0.3 * 0.5 * hours)
    per_hour = 3600 * found.tokens / found.simulation.step_s
    assert cost.tokens_per_dollar == pytest.approx(per_hour / 2.0)
    line = cost_line(cost, "somebody")
    assert "$2.00 an hour (somebody)" in line
    assert "energy $" in line


def test_what_a_run_writes_and_takes_is_told_as_far_as_it_is_known() -> None:
    """Bytes, their share of what the drive is rated for, energy at full load."""
    found = dataclasses.replace(found_on(PRICED), written={"checkpoints": 2.5e9})
    assert found.total_s is not None
    rated = dataclasses.replace(PRICED, drive=Drive(name="/nvme", endurance_bytes=1e12))
    energy = f"{500.0 * found.total_s / 3.6e6:.3g} kWh at full load"
    share = "writes 2.50 GB (0.25 % of the drive's rated 1.00 TB)"
    unknown = dataclasses.replace(PRICED, watts=None)
    assert wear_line(rated, found) == f"{share} · {energy}"
    assert wear_line(PRICED, found) == f"writes 2.50 GB · {energy}"
    assert wear_line(unknown, found) == "writes 2.50 GB"


def test_the_users_price_beats_a_published_one_and_none_is_invented() -> None:
    found = found_on(PRICED)
    assert cost_of(JOB, PRICED, found, Prices(per_hour=0.5)).per_hour == 0.5
    plain = dataclasses.replace(PRICED, price_per_hour=None, watts=None)
    cost = cost_of(JOB, plain, found, Prices(per_kwh=0.3))
    assert (cost.rent, cost.energy, cost.tokens_per_dollar) == (None, None, None)
    assert cost_line(cost, "") == ""


def offers(*machines) -> list[Offer]:
    return [Offer.of(JOB, m, [Way("", "", found_on(m))]) for m in machines]


def test_machines_stand_beside_each_other_the_best_value_first() -> None:
    dear = dataclasses.replace(PRICED, name="dear", price_per_hour=20.0)
    lines = next(iter(beside_each_other(offers(dear, PRICED), Prices()))).splitlines()
    assert "$/hour" in lines[0]
    assert "$ energy" not in lines[0], "no price of energy, no column"
    assert lines[1].startswith("made up")
    assert lines[2].startswith("dear")


def test_without_prices_there_is_no_column_but_a_word_on_how_to_give_one() -> None:
    plain = dataclasses.replace(PRICED, price_per_hour=None, watts=None)
    table, word = beside_each_other(offers(plain), Prices(per_kwh=0.3))
    assert "$" not in table
    assert "--price_per_hour" in word


def test_every_published_price_has_its_source_and_date() -> None:
    for key, entry in entries("devices").items():
        assert ("price" in entry) == ("price_source" in entry), key
        if "price" in entry:
            assert "2026" in entry["price_source"]
    machine = machine_from("h100")
    assert machine.price_per_hour == devices_known()["h100"].price_per_hour == 2.69
    text = "\n".join(hardware_lines())
    assert "$2.69/h" in text
    assert "runpod.io/pricing" in text


def test_a_profile_may_have_its_owners_price() -> None:
    content = a_profile().to_mapping()
    assert "price_per_hour" not in content
    priced = profile_from({**content, "price_per_hour": 0.4}, "here")
    assert priced.to_mapping()["price_per_hour"] == 0.4
    with pytest.raises(ProfileError, match="price_per_hour is 'much'"):
        profile_from({**content, "price_per_hour": "much"}, "here")


@pytest.mark.parametrize("text", ["much", "-1", "0", "nan", "inf"])
def test_a_flag_that_is_no_price_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "x.yaml", f"--price_per_hour={text}"]) == 2
    assert "price_per_hour: got" in capsys.readouterr().err
