"""What a run shows a person: aligned tables, the loss curve, and one step as a timeline.

Pure: numbers go in, text or a PNG comes out. A trace is any sequence of objects with the attributes
of `ssdtune.schedule.trace.TraceOp`.
"""

from ssdtune.report.pictures import FAINT, INK, ReportError, draw_loss, new_figure, save_figure
from ssdtune.report.steps import LANE_LABELS, LANES
from ssdtune.report.text import (
    Memory,
    duration,
    factor_words,
    format_table,
    hush_libraries,
    say,
    summary_table,
)
from ssdtune.report.timeline import draw_comparison, draw_timeline, timeline_figure

__all__ = [
    "FAINT",
    "INK",
    "LANES",
    "LANE_LABELS",
    "Memory",
    "ReportError",
    "draw_comparison",
    "draw_loss",
    "draw_timeline",
    "duration",
    "factor_words",
    "format_table",
    "hush_libraries",
    "new_figure",
    "save_figure",
    "say",
    "summary_table",
    "timeline_figure",
]
