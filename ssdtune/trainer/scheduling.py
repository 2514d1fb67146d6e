"""The plan of a training run: the fastest one predicted within the budgets, and a better one where steps come out
otherwise than predicted.

Without a profile of this machine (`ssdtune probe`) nothing can be predicted and the static plan stays.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ssdtune.cores import cpu_seconds
from ssdtune.errors import SSDTuneError
from ssdtune.memory import processes_here
from ssdtune.profiles import keep_refit, own_profile
from ssdtune.report import LANE_LABELS, factor_words
from ssdtune.schedule.cost import Pricing
from ssdtune.schedule.hunt import Effort
from ssdtune.schedule.plan import Lane, Tier
from ssdtune.schedule.profile import BUSY_CORES
from ssdtune.schedule.refit import refitted, work_name
from ssdtune.schedule.shares import search_within
from ssdtune.schedule.stored import written_bytes
from ssdtune.sizes import format_size
from ssdtune.trainer.summary import steady

if TYPE_CHECKING:
    from ssdtune.schedule.choices import Request
    from ssdtune.schedule.hunt import Found
    from ssdtune.schedule.memory import Passes
    from ssdtune.schedule.profile import Profile
    from ssdtune.schedule.simulate import Simulation
    from ssdtune.trainer.telemetry import StepRecord, Telemetry
    from ssdtune.visit.rehearsal import Rehearsed
    from ssdtune.visit.streamer import Streamer

MIN_GAIN = 0.02  # of a step's time: less does not pay for reading the resident weights anew
OFF_BY = 0.05  # a prediction that misses by more is made anew
# Steady steps whose median counts; twice as many after each search that found nothing better: where no lane explains
# why steps take longer, the next search finds nothing either.
WATCHED_STEPS = 4
MAX_CHANGES = 2  # of the plan during a run
WITNESSES = 8  # steady steps at least of a run that refits the profile
STEADY = 0.1  # of their median, between their quartiles: steps that vary more say little


class Schedule:
    """A streamed model's plan for one kind of step, priced on this machine.

    Args:
        streamer: whose plan it is.
        rehearsed: one micro-batch, its work counted.
        profile: the machine's.
        passes: of each block.
        num_tokens: of one optimizer step.
        depth: how many fills may run ahead, where the user said so; None: as many as are best.
    """

    def __init__(
        self,
        streamer: Streamer,
        rehearsed: Rehearsed,
        profile: Profile,
        passes: Passes,
        *,
        num_tokens: int,
        depth: int | None = None,
    ) -> None:
        assert rehearsed.work is not None
        self.streamer, self.work, self.profile = streamer, rehearsed.work, profile
        self.activation_bytes = rehearsed.footprint.activations_of(passes.num)
        self.passes, self.num_tokens = passes, num_tokens
        kept_bytes = rehearsed.footprint.kept_bytes if passes.kind == "train" else 0
        self.stored_bytes = passes.num * kept_bytes
        self.factors: dict[Lane, float] = {}
        self._effort = Effort.of(depth)

    @property
    def pricing(self) -> Pricing:
        """As far as is known now."""
        return self.priced(self.factors)

    def priced(self, factors: Mapping[Lane, float]) -> Pricing:
        """With these corrections of the profile; none: the profile alone, as earlier runs have refitted it."""
        return Pricing(
            self.work,
            self.profile,
            kind=self.passes.kind,
            num_micro_batches=self.passes.num,
            stored_bytes=self.stored_bytes,
            activation_bytes=self.activation_bytes,
            factors=factors,
        )

    @property
    def work_name(self) -> str:
        """What the profile is refitted for."""
        return work_name(self.passes.kind, self.work.dtype, self.work.autocast)

    @property
    def refit(self) -> Mapping[str, float]:
        """Lane -> factor that earlier runs have found."""
        return self.profile.refit_for(self.passes.kind, self.work.dtype, self.work.autocast)

    @property
    def is_known(self) -> bool:
        """Whether the profile has rates of all that the plan does: an older one may lack that of writing to NVMe."""
        plan = self.streamer.engine.plan
        writes = plan.block_inputs is Tier.NVME or bool(plan.stored_blocks)
        return self.profile.knows_writes or not writes or self.passes.kind != "train"

    def predicted(self) -> Simulation:
        """A steady step of the plan that is carried out now."""
        return self.pricing.simulation(self.streamer.engine.plan)

    def improve(
        self, request: Request, *, shares: bool = False, must: bool = False
    ) -> Found | None:
        """Carries out the best plan for the request from now on, where it gains enough; None where it does not.

        shares: whether weights and activations share the request's memory, however that is best. must: whatever it
        gains, since the plan that is carried out is not for this request; so it is where its steps write more than they
        may.
        """
        now_s = self.predicted().step_s
        must = must or self._writes_too_much(request)
        found = self.best(request, shares=shares)
        if not must and found.simulation.step_s > (1 - MIN_GAIN) * now_s:
            return None
        request = dataclasses.replace(request, budgets=found.plan.budgets)
        self.streamer.replanner.adopt(self.streamer, request, found.layout)
        return found

    def _writes_too_much(self, request: Request) -> bool:
        most = request.written_bytes
        if most is None:
            return False
        return written_bytes(self.pricing.steps(self.streamer.engine.plan)) > most

    def best(self, request: Request, *, shares: bool = False) -> Found:
        """The best plan for the request; nothing is carried out. Raises PlanError."""
        return search_within(request, self.pricing, self._effort, shares=shares)

    def lines(self) -> Iterator[str]:
        """Yields what a step will take, and what that assumes."""
        yield from self.predicted().lines(self.num_tokens, LANE_LABELS)
        if self.refit:
            yield f"refitted  by earlier runs: {factor_words(self.refit)} (`ssdtune probe` measures anew)"
        for words in self.profile.assumed_of(self.work.dtype, self.work.autocast):
            yield f"assumed   {words}"


class Watch(TrainerCallback):
    """Compares steps with their prediction, corrects it, and changes the plan between steps where another is faster.

    first: the prediction before the first step.
    """

    def __init__(
        self, schedule: Schedule, telemetry: Telemetry, say: Callable[[str], None]
    ) -> None:
        self.schedule, self.telemetry, self.say = schedule, telemetry, say
        self.first = schedule.predicted()
        self.num_changes, self._num_watched = 0, WATCHED_STEPS
        self._first_change: int | None = None  # records when the first plan was given up
        self._plan_since = 0  # records before the steady steps of the plan carried out now
        self._began = perf_counter(), cpu_seconds()  # the run: a clock, and what others had used
        self._since = (
            0  # records before this one were made under another plan, or are no steady steps
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first step reads what stays and learns the order of visits: not steady."""
        self._since = self._plan_since = len(self.telemetry.records) + 1
        self._began = perf_counter(), cpu_seconds()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the last steps when there are enough of them."""
        recent = self.telemetry.records[self._since :]
        if len(recent) < self._num_watched or self.num_changes >= MAX_CHANGES:
            return
        self._since = len(self.telemetry.records)
        schedule, before = self.schedule, self.schedule.predicted()
        measured_s = statistics.median(record.seconds for record in recent)
        if abs(before.step_s / measured_s - 1) <= OFF_BY:
            return
        for lane, predicted_s in before.busy_s.items():
            busy_s = _busy_s(recent, lane)
            if predicted_s > 0 and busy_s > 0:
                schedule.factors[lane] = schedule.factors.get(lane, 1.0) * busy_s / predicted_s
        found = schedule.improve(schedule.streamer.replanner.request)
        if found is None:
            self._num_watched *= 2
            return
        self.num_changes, self._num_watched = self.num_changes + 1, WATCHED_STEPS
        if self._first_change is None:
            self._first_change = self._since
        self._since = self._plan_since = self._since + 1
        read = found.plan.sequences[schedule.passes.kind].read_bytes
        self.say(
            f"replanned: steps take {measured_s:.3g} s, not {before.step_s:.3g}; another plan is predicted to take "
            f"{found.simulation.step_s:.3g} s ({format_size(read)} read a step)"
        )

    def compared(self) -> dict[str, tuple[float, float]]:
        """Predicted and measured seconds of the first plan's step ("step") and of each lane; nothing where there was
        no step."""
        records = steady(self.telemetry.records[: self._first_change])
        return _compared(self.first, records) if records else {}

    def keep(self) -> None:
        """Keeps what this run found the profile to be off by, for plans to come, and says so; nothing where it is no
        witness, or the profile is not this machine's any more. Never fails: the run itself is over and well."""
        schedule = self.schedule
        try:
            factors = self._refitted()
            if not factors or factors == schedule.refit or own_profile() != schedule.profile:
                return
            keep_refit(schedule.work_name, factors)
        except SSDTuneError as error:
            self.say(f"note: what the run says of the profile was not kept: {error}")
            return
        self.say(
            f"refitted  for the next plan: {factor_words(factors)} (a new `ssdtune probe` discards it)"
        )

    def _refitted(self) -> dict[str, float] | None:
        """Lane -> factor after this run, by the steps of its last plan; None where they were few or uneven, others used
        the cores, other processes of the run the drive, or tokens chose experts: those times are the data's."""
        records = self.telemetry.records[self._plan_since :]
        if self.schedule.streamer.replanner.request.visits_vary or len(records) < WITNESSES:
            return None
        if processes_here() > 1:
            return None
        if any(r.num_misses or r.num_over for r in records):
            return None
        low, middle, high = statistics.quantiles((r.seconds for r in records), n=4)
        began_s, others_s = self._began
        others_s, seconds = cpu_seconds() - others_s, perf_counter() - began_s
        if high - low > STEADY * middle or others_s > BUSY_CORES * seconds:
            return None
        schedule = self.schedule
        predicted = schedule.priced({}).simulation(schedule.streamer.engine.plan)
        return refitted(schedule.refit, _compared(predicted, records))


def _compared(
    predicted: Simulation, records: Sequence[StepRecord]
) -> dict[str, tuple[float, float]]:
    """ "step" and lanes -> predicted and measured seconds, of what took any. records: one or more."""
    pairs = {"step": (predicted.step_s, statistics.median(r.seconds for r in records))}
    for lane, predicted_s in predicted.busy_s.items():
        pairs[str(lane)] = (predicted_s, _busy_s(records, lane))
    return {name: pair for name, pair in pairs.items() if min(pair) > 0}


def _busy_s(records: Sequence[StepRecord], lane: Lane) -> float:
    return statistics.median(record.busy_s.get(str(lane), 0.0) for record in records)
