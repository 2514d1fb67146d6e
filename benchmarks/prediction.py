"""One command: predicted and measured steps side by side, over shapes, tokens, residents, methods and drive speeds.

    python benchmarks/prediction.py [--dtype bfloat16] [--rounds 4] [--profile FILE] [--json out.json]

First this machine is measured (`ssdtune probe`), which sees none of the runs. Then every run is a process of its own:
it says what it predicts from plan, counted operators and profile, and takes its steps. Predicted peak memory too.

Shared machines drift by more than what is to be shown. So a step counts where a matrix product right before and right
after it takes what the profile says, within STEADY (its *pace*; not looked at where the reader is slowed, since a pause
for it would help the reader). Steps are taken until enough of them count, MOST times as many at most; of a run in which
too few do, all count, and it is not called steady. A second error is that of the prediction whose compute takes as much
longer as those products did. The bars are said of all runs, of the steady ones, and of all at their pace.
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
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import inputs, measures  # noqa: E402

if TYPE_CHECKING:
    from ssdtune.schedule.profile import Profile

SHAPES = ("smollm2", "wide", "deep")  # the real one, and random ones of inputs.py
TOKENS = ((1, 2, 64), (2, 1, 256))  # (micro-batches, rows, length)
SHARES = (0.0, 0.5)  # of the layers' bytes that may stay
KINDS = (
    ("lora", 0.0),
    ("lora", 1.5),
    ("forward", 0.0),
    ("forward", 1.5),
)  # method, reading / compute
TIME_BAR, MEDIAN_BAR, PEAK_BAR = 0.10, 0.05, 0.10
STEADY = 0.10  # what a step's pace is off by
MOST = 6  # times as many steps as are to count
PACE_PRODUCT, PACE_ROUNDS = (128, 576, 1536), 5  # tokens, width, width of the result
PACE_WEIGHTS = 20  # more than caches hold, as a model's are


@dataclasses.dataclass(frozen=True)
class Case:
    """One run."""

    shape: str
    micro_batches: int
    rows: int
    length: int
    resident_share: float
    method: str
    reading: float  # the reader is slowed so that it takes so many times the predicted compute; 0: not slowed

    @property
    def name(self) -> str:
        """For the table."""
        slowed = f", reading {self.reading:g} x compute" if self.reading else ""
        return (
            f"{self.shape}, {self.method}, {self.micro_batches} x {self.rows} x {self.length}, "
            f"resident {self.resident_share:.0%}{slowed}"
        )


class Step(NamedTuple):
    """One measured step. paces: right before and right after it."""

    seconds: float
    paces: tuple[float, float]
    lanes: dict[str, float]

    @property
    def is_steady(self) -> bool:
        """Whether it counts."""
        return all(abs(pace - 1) <= STEADY for pace in self.paces)


def cases() -> Iterator[Case]:
    """All runs."""
    for shape in SHAPES:
        for tokens in TOKENS:
            for share in SHARES:
                for method, reading in KINDS:
                    yield Case(shape, *tokens, share, method, reading)


def model_folder(shape: str, model: Path, dtype: str = "float32") -> Path:
    """The model's files in that number format, made once in the cache."""
    folder = inputs.random_llama(shape) if shape in inputs.RANDOM_LLAMAS else model
    return inputs.in_dtype(folder, dtype, lambda line: None)


# ------------------------------------------------------------------ the process of one run


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Opens the model, predicts, takes steps."""
    import peft  # noqa: F401 (as a run does before it looks at what it holds)
    import torch

    from benchmarks.contestants import Ours
    from benchmarks.worker import forget_peak, memory_peak_bytes
    from ssdtune.profiles import load_profile
    from ssdtune.schedule.cost import Pricing
    from ssdtune.schedule.memory import Passes
    from ssdtune.schedule.plan import Lane
    from ssdtune.visit.memory import predict, resident_set_bytes
    from ssdtune.visit.rehearsal import rehearse

    case = Case(**job["case"])
    torch.set_num_threads(os.cpu_count() or 1)
    profile = load_profile(Path(job["profile"]))
    look = (lambda: 1.0) if case.reading else Pace(profile, job["dtype"])
    base_bytes = resident_set_bytes()
    forget_peak()
    num_rows = case.micro_batches * case.rows
    batch = [[3 + (7 * i + k) % 1000 for i in range(case.length)] for k in range(num_rows)]
    ours = Ours(
        {
            "model": job["folder"],
            "batch": batch,
            "dtype": job["dtype"],
            "seed": 0,
            "learning_rate": 1e-4,
            "lora_rank": 16,
            "micro_rows": case.rows,
            "prefetch": 2,
            "chunk_tokens": 4096,
            "throttled": True,
            "resident_share": case.resident_share,
        }
    )
    if case.method == "forward":
        ours.model.eval()
    micro = {key: value[: case.rows] for key, value in ours.batch.items()}
    rehearsed = rehearse(ours.model, micro)
    assert rehearsed.work is not None, rehearsed.footprint.how
    kind = "train" if case.method == "lora" else "forward"
    take = ours.step if case.method == "lora" else ours.forward
    for _ in range(2):  # the order of visits is known after the first
        take()
    ours.settle()
    plan, work = ours.plan, rehearsed.work

    def simulated(pace: float = 1.0) -> Any:
        factors = {Lane.COMPUTE: pace}
        num = case.micro_batches
        pricing = Pricing(work, profile, kind=kind, num_micro_batches=num, factors=factors)
        return pricing.simulation(plan)

    found = simulated()
    if case.reading:
        read = plan.sequences[kind].read_bytes
        rate = read / (case.reading * found.busy_s[Lane.COMPUTE]) if read else 1e15
        ours.set({"bytes_per_s": rate})
        profile = slowed(profile, rate)
        found = simulated()
        take()  # what was read ahead faster is gone
    take()  # steps follow one another as in training, and reading goes on between them: from the second they are steady
    steps = measured_steps(ours, take, look, job["rounds"])
    mean_pace = statistics.mean(pace for step in steps for pace in step.paces)
    peak = predict(
        ours.model,
        rehearsed.footprint,
        Passes(kind=kind, num=case.micro_batches),
        base_bytes=base_bytes,
    )
    result = {
        "predicted_s": found.step_s,
        "predicted_at_pace_s": simulated(mean_pace).step_s,
        "predicted_lanes": {str(lane): s for lane, s in found.busy_s.items()},
        "two_pass_s": found.two_pass_s,
        "times": [step.seconds for step in steps],
        "pace": mean_pace,
        "is_steady": all(step.is_steady for step in steps),
        "lanes": [step.lanes for step in steps],
        "predicted_peak": peak.ram_bytes,
        "peak": memory_peak_bytes(),
    }
    ours.close()
    return result


def slowed(profile: Any, bytes_per_s: float) -> Any:
    """The profile of a machine whose drive gives no more."""
    from ssdtune.schedule.curve import Curve

    slow = {"nvme_read": Curve(((1e6, 1e6 / bytes_per_s),))}
    return dataclasses.replace(profile, transfers={**profile.transfers, **slow})


def measured_steps(ours: Any, take: Any, look: Any, rounds: int) -> list[Step]:
    """As many steady steps; all that were taken, where too few are."""
    from ssdtune.schedule import trace

    steps: list[Step] = []
    after = look()
    while sum(step.is_steady for step in steps) < rounds and len(steps) < MOST * rounds:
        before, start = after, perf_counter()
        take()
        seconds, after = perf_counter() - start, look()
        lanes = {str(lane): s for lane, s in trace.lane_seconds(ours.ops()).items()}
        steps.append(Step(seconds, (before, after), lanes))
    steady = [step for step in steps if step.is_steady]
    return steady if len(steady) >= rounds else steps


class Pace:
    """How long a product takes now, over what its curve says. Made before memory is looked at: it holds some."""

    def __init__(self, profile: Profile, dtype_name: str) -> None:
        import torch

        from ssdtune.probe.matrices import by_next

        tokens, wide, out = PACE_PRODUCT
        dtype = getattr(torch, dtype_name)
        values = torch.randn(tokens, wide, dtype=dtype)
        weights = torch.randn(PACE_WEIGHTS * wide * out, dtype=dtype)
        self._run = by_next(torch.nn.functional.linear, values, weights, (out, wide))
        curve = profile.operators[dtype_name]["matmul_transposed"]
        self._usual_s = curve.seconds(2.0 * tokens * wide * out)
        self._run()

    def __call__(self) -> float:
        from ssdtune.probe.timing import timed

        times = (timed(self._run, lambda: None) for _ in range(PACE_ROUNDS))
        return statistics.median(times) / self._usual_s


# ------------------------------------------------------------------ the command


def run(case: Case, job: dict[str, Any]) -> dict[str, Any]:
    """Its row."""
    done = subprocess.run(
        [
            sys.executable,
            __file__,
            "--child",
            json.dumps({**job, "case": dataclasses.asdict(case)}),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{case.name}: no result\n{done.stderr[-3000:]}")
    row = json.loads(lines[-1].removeprefix("RESULT "))
    measured = statistics.median(row["times"])
    row |= {"case": case.name, "measured_s": measured, "error": row["predicted_s"] / measured - 1}
    row["error_at_pace"] = row["predicted_at_pace_s"] / measured - 1
    row["spread"] = (max(row["times"]) - min(row["times"])) / measured
    row["peak_error"] = row["predicted_peak"] / row["peak"] - 1
    return row


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield (
        "| run | predicted | measured (spread; pace) | off by | off by at its pace "
        "| compute: predicted, measured | peak off by |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        compute = statistics.median([lanes.get("compute", 0.0) for lanes in row["lanes"]])
        yield (
            f"| {row['case']} | {row['predicted_s']:.3f} s | {row['measured_s']:.3f} s "
            f"({row['spread']:.0%}; {row['pace']:.2f}{'' if row['is_steady'] else ', not steady'}) "
            f"| {row['error']:+.1%} | {row['error_at_pace']:+.1%} "
            f"| {row['predicted_lanes']['compute']:.3f}, "
            f"{compute:.3f} s | {row['peak_error']:+.1%} |"
        )


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised and what came out."""
    peaks = [abs(row["peak_error"]) for row in rows]
    steady = [row for row in rows if row["is_steady"]]
    found: list[dict[str, Any]] = []
    for words, errors in (
        ("of all runs' step times", [abs(row["error"]) for row in rows]),
        (f"of {len(steady)} steady runs' step times", [abs(row["error"]) for row in steady]),
        ("of all runs' step times at their pace", [abs(row["error_at_pace"]) for row in rows]),
    ):
        if errors:
            tail, middle = measures.quantile(errors, 0.9), statistics.median(errors)
            found.append(measures.bar(f"nine tenths {words} are off by", tail, TIME_BAR))
            found.append(measures.bar(f"the median {words} is off by", middle, MEDIAN_BAR))
    return [*found, measures.bar("every peak is off by", max(peaks), PEAK_BAR)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=inputs.cache_folder() / "smollm2-135m-instruct"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--profile", type=Path, help="instead of measuring anew")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print("RESULT " + json.dumps(child(json.loads(options.child))), flush=True)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        profile = options.profile or Path(scratch) / "profile.yaml"
        if options.profile is None:
            from ssdtune.probe import print_probe

            print_probe(inputs.cache_folder(), profile)
        for case in cases():
            if options.only in case.name:
                folder = model_folder(case.shape, options.model, options.dtype)
                job = {
                    "folder": str(folder),
                    "dtype": options.dtype,
                    "profile": str(profile),
                    "rounds": options.rounds,
                }
                rows.append(run(case, job))
                print(list(table(rows[-1:]))[-1], flush=True)
    found = bars(rows)
    for bar in found:
        verdict = "met" if bar["passed"] else "**not met**"
        print(f"- {bar['bar']} {bar['value']:.1%} (bar {bar['limit']:.0%}): {verdict}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "bars": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
