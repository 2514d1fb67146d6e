"""What a run costs: hours at a machine's price, energy at its watts; and machines side by side, in tokens per dollar.

As Melange (arXiv 2404.14527) compares GPUs: T/$, tokens of an hour by the price of an hour, of the workload at hand and
not of a data sheet's peak. A price is a rented machine's with that device, as somebody has published it; its RAM and
drive are not those that are planned for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ssdtune.planning.ways import Way, knows_steps
from ssdtune.report import duration, format_table
from ssdtune.schedule.outcome import Outcome

if TYPE_CHECKING:
    from ssdtune.schedule.job import Job
    from ssdtune.schedule.machine import Machine

JOULES_PER_KWH = 3.6e6


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """Dollars that the user gives: an hour of every machine, a kilowatt-hour."""

    per_hour: float | None = None
    per_kwh: float | None = None

    def of(self, machine: Machine) -> float | None:
        """An hour of the machine: the user's figure beats a published one; None where there is neither."""
        return machine.price_per_hour if self.per_hour is None else self.per_hour


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Dollars; None where a price, the watts or the run's length is not known.

    per_hour: of the machine. rent, energy: of the run. tokens_per_dollar: by the rent alone.
    """

    per_hour: float | None
    rent: float | None
    energy: float | None
    tokens_per_dollar: float | None


def cost_of(job: Job, machine: Machine, found: Outcome, prices: Prices) -> Cost:
    """Of the run, without what it takes to load, evaluate and save."""
    per_hour, step = prices.of(machine), found.simulation
    if step is None:
        return Cost(per_hour=per_hour, rent=None, energy=None, tokens_per_dollar=None)
    hours = found.num_steps * step.step_s / 3600 if knows_steps(job) else None
    energy = None
    if prices.per_kwh is not None and machine.watts is not None and hours is not None:
        energy = prices.per_kwh * machine.watts * hours * 3600 / JOULES_PER_KWH
    return Cost(
        per_hour=per_hour,
        rent=None if per_hour is None or hours is None else per_hour * hours,
        energy=energy,
        tokens_per_dollar=3600 * found.tokens / step.step_s / per_hour if per_hour else None,
    )


def cost_line(cost: Cost, source: str) -> str:
    """For a person; empty where nothing is known."""
    told: list[str] = []
    if cost.per_hour is not None:
        told.append(f"${cost.per_hour:.2f} an hour{f' ({source})' if source else ''}")
    if cost.rent is not None:
        told.append(f"${cost.rent:,.2f} the run")
    if cost.tokens_per_dollar is not None:
        told.append(f"{cost.tokens_per_dollar / 1e6:.3g} M tokens per $")
    if cost.energy is not None:
        told.append(f"energy ${cost.energy:,.2f}")
    return " · ".join(told)


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """A machine and the first way that fits it; None: none does."""

    job: Job
    machine: Machine
    found: Outcome | None

    @staticmethod
    def of(job: Job, machine: Machine, ways: Sequence[Way]) -> Offer:
        """The first of the ways that fits."""
        fitting = (way.found for way in ways if isinstance(way.found, Outcome))
        return Offer(job, machine, next(fitting, None))


def beside_each_other(offers: Sequence[Offer], prices: Prices) -> Iterator[str]:
    """Yields a table of machines, the most tokens per dollar first where prices are known. Columns of which nothing is
    known are left out."""
    costs = [
        None if o.found is None else cost_of(o.job, o.machine, o.found, prices) for o in offers
    ]
    rows = [_row(offer, cost) for offer, cost in zip(offers, costs, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: -(_value(costs[i])))
    header = ("machine", "s/step", "tok/s", "total", "$/hour", "$ the run", "M tok/$", "$ energy")
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    yield format_table(
        [[rows[k][i] for i in kept] for k in order], header=[header[i] for i in kept]
    )
    unpriced = [o.machine.name for o in offers if prices.of(o.machine) is None]
    if unpriced:
        yield f"no price is known of {', '.join(unpriced)}: --price_per_hour 0.40 gives one"


def _value(cost: Cost | None) -> float:
    return 0.0 if cost is None or cost.tokens_per_dollar is None else cost.tokens_per_dollar


def _row(offer: Offer, cost: Cost | None) -> list[str]:
    found = offer.found
    step = None if found is None else found.simulation
    if found is None or step is None or cost is None:
        return [offer.machine.name, "does not fit" if found is None else "", *[""] * 6]

    def told(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    total_s = found.total_s if knows_steps(offer.job) else None
    per_dollar = cost.tokens_per_dollar
    return [
        offer.machine.name,
        f"{step.step_s:.3g}",
        f"{found.tokens / step.step_s:,.0f}",
        "" if total_s is None else duration(total_s),
        told(cost.per_hour, "{:.2f}"),
        told(cost.rent, "{:,.2f}"),
        told(None if per_dollar is None else per_dollar / 1e6, "{:.3g}"),
        told(cost.energy, "{:,.2f}"),
    ]
