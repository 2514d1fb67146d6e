"""Pictures: the loss curve, and what all of them are drawn with and saved by."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssdtune.durable import make_folder, write_file_atomically
from ssdtune.errors import SSDTuneError

FORWARD, BACKWARD = "#3b7dd8", "#e08a2c"
INK, FAINT = "#22252a", "#8a8f98"


class ReportError(SSDTuneError):
    """There is nothing to draw, or nothing to draw it with."""


def draw_loss(log_history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss of each logged step, and the held-out loss where it was measured, as a PNG.

    log_history: as `transformers.TrainerState` keeps it. Raises ReportError if it holds no loss.
    """
    train = [(row["step"], float(row["loss"])) for row in log_history if "loss" in row]
    held_out = [(row["step"], float(row["eval_loss"])) for row in log_history if "eval_loss" in row]
    if not train:
        raise ReportError("the log holds no loss: nothing to draw (logging_steps too large?)")
    figure = new_figure(8.0, 4.5)
    axes = figure.add_subplot()
    solid = {"color": FORWARD, "lw": 1.8, "marker": "o", "ms": 3}
    dashed = {"color": BACKWARD, "lw": 1.8, "ls": "--", "marker": "D", "ms": 6}
    for name, series, style in (("training", train, solid), ("held out", held_out, dashed)):
        if series:
            values = [f"{loss:.2f}" for _, loss in (series[0], series[-1])[-len(series) :]]
            label = f"{name}  {' → '.join(values)}"
            axes.plot(*zip(*series, strict=True), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)")
    figure.suptitle("Training loss", x=0.02, ha="left", color=INK, fontsize=13)
    axes.margins(y=0.15)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e4e4e0", lw=0.8)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """A figure without pyplot: no global state, no display, any thread."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError("drawing needs matplotlib: pip install 'ssdtune[plot]'") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")


def save_figure(figure: Any, path: Path) -> None:
    """As a PNG, whole or not at all."""
    make_folder(path.parent)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_file_atomically(path, image.getvalue())
