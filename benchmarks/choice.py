"""One command: is the plan that is chosen by prediction the fastest that can be had? A sweep of real runs answers.

    python benchmarks/choice.py [--profile FILE] [--rounds 5] [--only SUBSTR] [--json out.json]

For each case, in one process: the chosen plan; every plan of a sweep over rows at once, prefetch depths and sets of
blocks that stay (how many, and which), all within the same RAM: more rows at once leave less of it for weights. Each is
run. Then the chosen one and the sweep's best three run again, taking turns. The chosen one's median may be at most 5 %
plus half the interquartile range above the best's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import inputs, measures  # noqa: E402
from benchmarks.prediction import model_folder, slowed  # noqa: E402

SHAPES = ("wide", "deep")
READING = (0.0, 0.7, 1.5)  # times the predicted compute; 0: the drive as it is
SHARES = (0.0, 0.25, 0.6)  # of the model's bytes beyond the slots of depth 2
DEPTHS = (1, 2, 3)
STEP_ROWS, LENGTH = 2, 64
BAR = 0.05
BEST = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One budget on one drive."""

    shape: str
    reading: float
    share: float

    @property
    def name(self) -> str:
        """For the table."""
        slowed = f"reading {self.reading:g} x compute" if self.reading else "the drive as it is"
        return f"{self.shape}, {slowed}, room for {self.share:.0%}"


def cases() -> Iterator[Case]:
    """All of them."""
    for shape in SHAPES:
        for reading in READING:
            for share in SHARES:
                yield Case(shape, reading, share)


# ------------------------------------------------------------------ the process of one case


def layouts(request: Any) -> Iterator[tuple[str, Any]]:
    """The sweep: (name, layout) for each way to share slots, depth, number of blocks that stay and pattern that fits."""
    from ssdtune.schedule.arrange import first, last, spread
    from ssdtune.schedule.choices import room_for, skeletons, static_choice
    from ssdtune.schedule.planner import layout_of

    deep = dataclasses.replace(request, prefetch=max(DEPTHS))
    seen = set()
    for classes, depth in skeletons(deep):
        static = static_choice(deep, classes, depth) if depth in DEPTHS else None
        if static is None:
            continue
        way = "one class" if len(classes) == 1 else "classes"
        sets = {"static": static.residents}
        members = sorted(max(classes, key=len))
        most = len(static.residents & set(members))
        for num in sorted({most, most // 2}):
            for pattern in (spread, first, last):
                words = f"{num} of {len(members)} {pattern.__name__}"
                sets[words] = frozenset(pattern(members, num))
        for words, residents in sets.items():
            choice = dataclasses.replace(static, residents=residents)
            layout = layout_of(deep, choice) if room_for(deep, choice) is not None else None
            key = (layout and layout.slots, layout and layout.tiers, layout and layout.allowed)
            if layout is not None and key not in seen:
                seen.add(key)
                yield f"{way}, {depth} ahead, {words}", layout


@dataclasses.dataclass(frozen=True)
class Cut:
    """A step's rows, so many at once: the request within the RAM that is left for weights, what its steps cost."""

    rows: int
    request: Any
    pricing: Any


def cuts(ours: Any, profile: Any) -> Iterator[Cut]:
    """Yields each way to cut a step's rows evenly. The RAM is that of one row at once with the model's budget."""
    from ssdtune.schedule.cost import Pricing
    from ssdtune.schedule.grid import divisors
    from ssdtune.schedule.memory import Passes
    from ssdtune.visit.memory import predict
    from ssdtune.visit.rehearsal import rehearse

    request = ours.streamer.replanner.request
    alone = None
    for rows in divisors(STEP_ROWS):
        num = STEP_ROWS // rows
        rehearsed = rehearse(ours.model, {key: value[:rows] for key, value in ours.batch.items()})
        assert rehearsed.work is not None, rehearsed.footprint.how
        peak = predict(ours.model, rehearsed.footprint, Passes(num=num), base_bytes=0).ram_bytes
        alone = peak if alone is None else alone
        ram_bytes = request.budgets.ram_bytes - (peak - alone)
        budgets = dataclasses.replace(request.budgets, ram_bytes=ram_bytes)
        pricing = Pricing(rehearsed.work, profile, num_micro_batches=num)
        yield Cut(rows, dataclasses.replace(request, budgets=budgets), pricing)


def chosen_of(cuts_: Sequence[Cut]) -> tuple[Cut, Any]:
    """What `micro_batch_size: auto` takes: the fastest plan of all cuts, of equally fast ones that of fewest rows."""
    from ssdtune.schedule.grid import best_of
    from ssdtune.schedule.plan import PlanError
    from ssdtune.schedule.search import search

    found: list[tuple[Cut, Any]] = []
    for cut in cuts_:
        try:
            found.append((cut, search(cut.request, cut.pricing)))
        except PlanError:  # so many rows leave too little for weights
            continue
    best = best_of(found, lambda one: one[1].simulation.step_s, lambda one: (one[0].rows,))
    assert best is not None, "no cut fits"
    return best


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Opens the model, chooses, sweeps, runs the best again."""
    import torch

    from benchmarks.contestants import Ours
    from ssdtune.profiles import load_profile
    from ssdtune.schedule.plan import Lane

    case = Case(**job["case"])
    torch.set_num_threads(os.cpu_count() or 1)
    ours = Ours(
        {
            "model": job["folder"],
            "batch": [[3 + (7 * i + k) % 1000 for i in range(LENGTH)] for k in range(STEP_ROWS)],
            "dtype": "float32",
            "seed": 0,
            "learning_rate": 1e-4,
            "lora_rank": 16,
            "micro_rows": 1,
            "prefetch": 2,
            "chunk_tokens": 4096,
            "throttled": True,
            "resident_share": case.share,
        }
    )
    profile = load_profile(Path(job["profile"]))
    for _ in range(2):  # the order of visits is known after the first
        ours.step()
    replanner = ours.streamer.replanner
    if case.reading:
        compute = next(cuts(ours, profile)).pricing.simulation(ours.plan).busy_s[Lane.COMPUTE]
        read = ours.plan.sequences["train"].read_bytes
        rate = max(read, ours.plan.model_bytes) / (case.reading * compute)
        ours.set({"bytes_per_s": rate})
        profile = slowed(profile, rate)
    all_cuts = list(cuts(ours, profile))
    cut, found = chosen_of(all_cuts)
    plans = {"chosen": (cut, found.layout)}
    for each in all_cuts:
        for name, layout in layouts(each.request):
            plans[f"{each.rows} at once, {name}"] = (each, layout)

    def run(name: str, rounds: int) -> list[float]:
        cut, layout = plans[name]
        ours.streamer.micro_batch_size = cut.rows
        replanner.adopt(ours.streamer, cut.request, layout)
        assert ours.plan.ram_bytes <= cut.request.budgets.ram_bytes
        ours.step()  # what stays is read now
        times = []
        for _ in range(rounds):  # one after the other, as in training: reading goes on between them
            start = perf_counter()
            ours.step()
            times.append(perf_counter() - start)
        return times

    once = {name: run(name, 1)[0] for name in plans}
    best = sorted((n for n in plans if n != "chosen"), key=lambda n: once[n])[:BEST]
    again: dict[str, list[float]] = {name: [] for name in ["chosen", *best]}
    for _ in range(job["rounds"]):
        for name in again:
            again[name] += run(name, 1)
    ours.close()
    return {
        "rows_at_once": cut.rows,
        "predicted_s": found.simulation.step_s,
        "num_swept": len(plans) - 1,
        "once": once,
        "again": again,
    }


# ------------------------------------------------------------------ the command


def run(case: Case, job: dict[str, Any]) -> dict[str, Any]:
    """One case's row."""
    command = [sys.executable, __file__, "--child"]
    command.append(json.dumps({**job, "case": dataclasses.asdict(case)}))
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{case.name}: no result\n{done.stderr[-3000:]}")
    row = json.loads(lines[-1].removeprefix("RESULT "))
    medians = {name: statistics.median(times) for name, times in row["again"].items()}
    chosen = medians.pop("chosen")
    best = min(medians, key=lambda name: medians[name])
    quarters = statistics.quantiles(row["again"]["chosen"], n=4)
    row |= {"case": case.name, "chosen_s": chosen, "best": best, "best_s": medians[best]}
    row |= {"slower": chosen / medians[best] - 1, "iqr": (quarters[2] - quarters[0]) / chosen}
    return row


def table(row: dict[str, Any]) -> str:
    """A line of Markdown."""
    worst = max(row["once"].values()) / row["best_s"]
    return (
        f"| {row['case']} | {row['predicted_s']:.3f} s | {row['rows_at_once']} at once: {row['chosen_s']:.3f} s "
        f"(IQR {row['iqr']:.0%}) | "
        f"{row['best_s']:.3f} s: {row['best']} | {row['slower']:+.1%} | {row['num_swept']}, worst {worst:.2f} x |"
    )


def bar(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was promised and what came out, the scatter of the runs allowed for."""
    beyond = max(row["slower"] - row["iqr"] / 2 for row in rows)
    return measures.bar("the chosen plan is slower than the sweep's best by at most", beyond, BAR)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", type=Path, help="instead of measuring anew")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print("RESULT " + json.dumps(child(json.loads(options.child))), flush=True)
        return 0
    rows = []
    print("| case | predicted | chosen | the sweep's best | slower by | swept |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        profile = options.profile or Path(scratch) / "profile.yaml"
        if options.profile is None:
            from ssdtune.probe import print_probe

            print_probe(inputs.cache_folder(), profile)
        for case in cases():
            if options.only in case.name:
                folder = model_folder(case.shape, Path())
                job = {"folder": str(folder), "profile": str(profile), "rounds": options.rounds}
                rows.append(run(case, job))
                print(table(rows[-1]), flush=True)
    found = bar(rows)
    verdict = "met" if found["passed"] else "**not met**"
    print(
        f"- {found['bar']} {found['value']:.1%} (bar {found['limit']:.0%}): {verdict}", flush=True
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "bar": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
