"""What `sst2.py` wrote, as a table and as curves: `python benchmarks/sst2_table.py rows.jsonl [--draw curve.png]`.

At equal forward passes, seconds and bytes: each run's curve between its looks, a straight line from one to the next, at
the smallest total that any run came to. Curves begin at the untuned model. Means over seeds; of accuracies the range, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

Row = dict[str, Any]
SETTINGS = "settings"
UNTUNED, BASELINE, FIRST_ORDER = "untuned", "mezo", "lora"
ERRORS_BAR, FORWARDS_BAR = 3.0, 0.5
AXES = {"forwards": "{:,.0f} forwards", "seconds": "{:,.0f} s", "bytes": "{:,.3g} GB"}


# ------------------------------------------------------------------ the file


class RecordError(Exception):
    """A file of something else."""


class Record:
    """Rows on the drive as they come, one JSON object a line; the first says what they have in common."""

    def __init__(self, path: Path, settings: Row | None = None) -> None:
        """settings: of the rows to come; None: to read. Raises RecordError for a file with others."""
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a line that was cut off is none
        found = [json.loads(line) for line in whole.splitlines()]
        self.settings: Row = found[0][SETTINGS] if found else settings or {}
        self.rows: list[Row] = found[1:]
        if settings is None:
            return
        if settings != self.settings:
            keys = [k for k in settings if settings[k] != self.settings.get(k)]
            told = ", ".join(f"{k} {self.settings.get(k)}, not {settings[k]}" for k in keys)
            raise RecordError(f"{path} has rows of {told}.\nGive the same ones, or another --json.")
        with path.open("r+b" if content else "wb") as file:
            file.truncate(len(whole))
        if not found:
            self._append({SETTINGS: settings})

    def add(self, row: Row) -> None:
        """One more."""
        self.rows.append(row)
        self._append(row)
        print(json.dumps(row), flush=True)

    def end_of(self, told: Row) -> Row | None:
        """The last row of a run that is over; None: it is not, or has not begun. told: what its rows have in common.
        Raises RecordError where the contender's rows are of another method."""
        for row in self.rows:
            if row["contender"] == told["contender"] and row["how"] != told["how"]:
                raise RecordError(
                    f"{self.path} has rows of {told['contender']} as {row['how']}, not {told['how']}.\n"
                    "Give another --json."
                )
        of_run = (row for row in self.rows if all(row.get(k) == v for k, v in told.items()))
        return next((row for row in of_run if row["is_last"]), None)

    def _append(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


# ------------------------------------------------------------------ curves


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run from the untuned model on. rows: its looks, `forwards` ascending; the last may have no loss: diverged."""

    rows: tuple[Row, ...]

    @property
    def has_diverged(self) -> bool:
        """Whether its loss is no number any more."""
        return self.rows[-1]["eval_loss"] is None

    def at(self, axis: str, place: float, name: str) -> float:
        """A number at a place between looks."""
        for left, right in zip(self.rows, self.rows[1:], strict=False):
            if place <= right[axis]:
                part = (place - left[axis]) / (right[axis] - left[axis])
                return left[name] + part * (right[name] - left[name])
        return self.rows[-1][name]

    def forwards_to(self, loss: float) -> float:
        """How many until the loss on the dev rows is as low; infinite: it never is."""
        for left, right in zip(self.rows, self.rows[1:], strict=False):
            before, after = left["eval_loss"], right["eval_loss"]
            if before <= loss:
                return left["forwards"]
            if after is not None and after <= loss:
                part = (before - loss) / (before - after)
                return left["forwards"] + part * (right["forwards"] - left["forwards"])
        return math.inf


Curves = Mapping[str, Mapping[int, Curve]]  # by contender and seed


def curves(record: Record) -> Curves:
    """Of all runs that are over, but those of the grid. Where a run was cut and run again, or with another rate, the later
    rows count."""
    start = {**dict.fromkeys(AXES, 0.0), **untuned(record)}
    looks: dict[str, dict[int, dict[int, Row]]] = {}
    for row in record.rows:
        if row["contender"] != UNTUNED and not row["is_grid"]:
            by_seed = looks.setdefault(row["contender"], {})
            seen = by_seed.setdefault(row["seed"], {})
            if any(known["rate"] != row["rate"] for known in seen.values()):
                seen.clear()
            seen[row["forwards"]] = row
    found: dict[str, dict[int, Curve]] = {}
    for name, by_seed in looks.items():
        for seed, seen in by_seed.items():
            rows = [seen[k] for k in sorted(seen)]
            if rows[-1]["is_last"]:
                found.setdefault(name, {})[seed] = Curve((start, *rows))
    return found


def untuned(record: Record) -> Row:
    """The row of the model as it was."""
    return next(row for row in record.rows if row["contender"] == UNTUNED)


def common_totals(found: Curves) -> dict[str, float]:
    """By axis: the smallest total of a run that came to its end."""
    ends = [
        c.rows[-1] for by_seed in found.values() for c in by_seed.values() if not c.has_diverged
    ]
    return {axis: min((row[axis] for row in ends), default=0.0) for axis in AXES}


# ------------------------------------------------------------------ the table


def lines(record: Record) -> Iterator[str]:
    """Markdown."""
    found, start, told = curves(record), untuned(record), record.settings
    error = standard_error(record)
    totals = common_totals(found)
    yield (
        f"{told['model']}, {told['dtype']}, {told['per_class']} rows of each class, {told['rows']} rows a forward pass. "
        f"Untuned: {start['accuracy']:.1%} of {told['dev_rows']} dev rows, loss {start['eval_loss']:.4f}; standard error "
        f"of an accuracy {error:.1%}. Accuracy: mean over seeds (range); loss: mean. {_machines(record)}."
    )
    yield ""
    heads = [_amount(axis, totals[axis]) for axis in AXES]
    columns = ["contender", "seeds", "rate", "a step", *(f"at {head}" for head in heads)]
    columns.append(f"forwards to {BASELINE}'s loss")
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for name, by_seed in found.items():
        yield f"| {' | '.join(_cells(name, by_seed, found, totals))} |"
    yield ""
    yield from bars(found, start["accuracy"], error)


def _machines(record: Record) -> str:
    """Where the seconds were measured."""
    found = {(row["processor"], row["threads"]) for row in record.rows}
    return "; ".join(f"{processor}, {threads} threads" for processor, threads in sorted(found))


def standard_error(record: Record) -> float:
    """Of an accuracy on the dev rows, at most."""
    return math.sqrt(0.25 / record.settings["dev_rows"])


def _cells(
    name: str, by_seed: Mapping[int, Curve], found: Curves, totals: Mapping[str, float]
) -> Iterator[str]:
    ends = [curve.rows[-1] for curve in by_seed.values()]
    yield name
    yield str(len(by_seed))
    yield ", ".join(f"{rate:.2g}" for rate in dict.fromkeys(row["rate"] for row in ends))
    step = [statistics.median(row[axis] / row["steps"] for row in ends) for axis in AXES]
    yield f"{step[0]:.0f} forwards, {step[1]:.2f} s, {step[2] / 1e6:,.0f} MB"
    for axis, total in totals.items():
        yield _reached(by_seed, axis, total)
    reached = forwards_to_baseline(name, found)
    yield "-" if not reached else _count(statistics.median(reached.values()))


def _reached(by_seed: Mapping[int, Curve], axis: str, total: float) -> str:
    lost = [str(seed) for seed, curve in by_seed.items() if curve.has_diverged]
    if lost:
        return f"diverged (seed {', '.join(lost)})"
    right, loss = (
        [curve.at(axis, total, name) for curve in by_seed.values()]
        for name in ("accuracy", "eval_loss")
    )
    mean = statistics.mean(right)
    return f"{mean:.1%} ({min(right):.1%} to {max(right):.1%}), {statistics.mean(loss):.4f}"


def forwards_to_baseline(name: str, found: Curves) -> dict[int, float]:
    """Of each seed, how many until a contender has the loss that the baseline ends with."""
    baseline = found.get(BASELINE, {})
    return {
        seed: curve.forwards_to(baseline[seed].rows[-1]["eval_loss"])
        for seed, curve in found[name].items()
        if seed in baseline and not baseline[seed].has_diverged
    }


def best_of(found: Curves) -> str | None:
    """Without gradients: who ends with the lowest loss, by the mean over seeds."""
    whole = {
        name: statistics.mean(curve.rows[-1]["eval_loss"] for curve in by_seed.values())
        for name, by_seed in found.items()
        if name != FIRST_ORDER and not any(curve.has_diverged for curve in by_seed.values())
    }
    return min(whole, key=lambda name: whole[name], default=None)


def bars(found: Curves, untuned_accuracy: float, error: float) -> Iterator[str]:
    """What was asked for, and what was found."""
    best = best_of(found)
    if best is None:
        return
    gains = [(c.rows[-1]["accuracy"] - untuned_accuracy) / error for c in found[best].values()]
    yield _bar(
        f"accuracy of the best, {best}, over the untuned one: {', '.join(f'{g:+.1f}' for g in gains)} standard errors",
        f"{ERRORS_BAR:g} in each of {len(gains)} seeds",
        is_met=min(gains) >= ERRORS_BAR,
    )
    reached = forwards_to_baseline(best, found)
    if not reached:
        return
    ends = {seed: found[BASELINE][seed].rows[-1]["forwards"] for seed in reached}
    share = statistics.median(reached[seed] / ends[seed] for seed in reached)
    yield _bar(
        f"forwards of {best} to {BASELINE}'s last loss / {BASELINE}'s: {share:.2f}, median of {len(reached)} seeds",
        f"{FORWARDS_BAR:g}",
        is_met=share <= FORWARDS_BAR,
    )


def _bar(told: str, limit: str, *, is_met: bool) -> str:
    return f"- {told} (bar {limit}): {'met' if is_met else '**not met**'}"


def _amount(axis: str, total: float) -> str:
    return AXES[axis].format(total / 1e9 if axis == "bytes" else total)


def _count(forwards: float) -> str:
    return f"{forwards:,.0f}" if math.isfinite(forwards) else "never"


# ------------------------------------------------------------------ the curves


def draw(record: Record, path: Path) -> None:
    """A PNG: loss and accuracy on the dev rows over forwards, seconds and bytes; the mean over seeds, and their range."""
    from ssdtune.report import new_figure, save_figure

    found, totals = curves(record), common_totals(curves(record))
    figure = new_figure(13.0, 7.0)
    grid = figure.subplots(2, len(AXES), squeeze=False, sharey="row")
    for row, name in zip(grid, ("eval_loss", "accuracy"), strict=True):
        for axes, axis in zip(row, AXES, strict=True):
            _draw_one(axes, found, axis, name)
            axes.axvline(totals[axis] / _unit(axis), color="#b0b0a8", lw=0.8, ls=":")
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=5
    )
    save_figure(figure, path)


def _unit(axis: str) -> float:
    """Of the drawing's places."""
    return 1e9 if axis == "bytes" else 1.0


def _draw_one(axes: Any, found: Curves, axis: str, name: str) -> None:
    unit = _unit(axis)
    for contender, by_seed in found.items():
        whole = [curve for curve in by_seed.values() if not curve.has_diverged]
        if not whole:
            continue
        places = [p * min(c.rows[-1][axis] for c in whole) / 100 for p in range(101)]
        values = [[curve.at(axis, place, name) for curve in whole] for place in places]
        (line,) = axes.plot(
            [place / unit for place in places],
            [statistics.mean(v) for v in values],
            label=contender,
        )
        axes.fill_between(
            [place / unit for place in places],
            [min(v) for v in values],
            [max(v) for v in values],
            color=line.get_color(),
            alpha=0.15,
            lw=0,
        )
    axes.set_xlabel("GB moved" if axis == "bytes" else axis)
    axes.set_ylabel(f"{name.replace('eval_', '')} on the dev rows")
    axes.grid(color="#e4e4e0", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, prints, draws."""
    parser = argparse.ArgumentParser(description="The table of rows that sst2.py wrote.")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--draw", type=Path, help="the curves, a PNG")
    options = parser.parse_args(argv)
    record = Record(options.rows)
    print(*lines(record), sep="\n")
    if options.draw:
        draw(record, options.draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
