"""What a run tells, and whom."""

from dataclasses import dataclass

from ssdtune.keys.ranges import STEPS
from ssdtune.settings import Names, Or, Text, Whole, key


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class LogKeys:
    """Lines and trackers."""

    logging_steps: float = key(
        STEPS, "steps between two lines (steps are long here: each one)", default=1
    )
    report_to: tuple[str, ...] = key(
        Names(
            none_word="none",
            words=("tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "trackio", "swanlab"),
        ),
        "trackers; nothing leaves your machine unless named here",
        default=(),
        example="tensorboard",
    )
    run_name: str | None = key(
        Or("none", Text("a name")), "the run's name in trackers", default=None, example="first"
    )
    dataloader_num_workers: int = key(
        Whole(0, 64), "processes that collate rows; 0: none beside the main one", default=0
    )
