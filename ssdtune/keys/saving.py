"""When a run evaluates and saves, where it lies and how it goes on."""

from dataclasses import dataclass
from pathlib import Path

from ssdtune.keys.ranges import COUNT, STEPS
from ssdtune.settings import OneOf, Or, Text, YesNo, YesNoOr, key


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class SavingKeys:
    """Evaluate, save, resume."""

    eval_strategy: str = key(
        OneOf(("no", "steps", "epoch")),
        "when to evaluate",
        default="no",
        aliases=("evaluation_strategy",),
    )
    eval_steps: float = key(
        Or("auto", STEPS), "steps between two; auto: save_steps", default=None, example="100"
    )
    eval_on_start: bool = key(
        YesNo(), "evaluate before the first step: what training has changed", default=False
    )
    save_strategy: str = key(
        OneOf(("no", "steps", "epoch"), later=("best",)), "when to save", default="steps"
    )
    save_steps: float = key(
        STEPS, "steps between two (steps are long here, so fewer than Trainer's 500)", default=100
    )
    save_total_limit: int | None = key(
        Or("none", COUNT),
        "checkpoints kept, the newest; none: all",
        default=2,
    )
    load_best_model_at_end: bool = key(
        YesNo(),
        "end with the best checkpoint instead of the last; where all weights train, `ssdtune replay` makes those of any step",
        default=False,
    )
    metric_for_best_model: str = key(
        Text("the name of a metric"), "what best means", default="loss"
    )
    resume_from_checkpoint: bool | str = key(
        YesNoOr(Text("auto or the path of a checkpoint", is_path=True)),
        "auto: go on where output_dir stands, if it does; true: it must; false: start anew",
        default="auto",
    )
    output_dir: Path = key(  # noqa: RUF009
        Text("a folder", is_folder=True),
        "where the run goes; the same command again resumes there",
        example="runs/my-first",
    )
