"""What a run's report claims, held against traces small enough to reckon by hand."""

import dataclasses
import itertools

import pytest

from ssdtune import report
from ssdtune.report import pictures, timeline
from ssdtune.report.steps import busy_seconds, training_steps

# One step: (lane, block, direction, start, end, wait, bytes)
STEP = [
    ("nvme_read", "model.embed_tokens", "F", 0.0, 1.0, 0.0, 100),
    ("compute", "model.embed_tokens", "F", 0.0, 2.0, 1.0, 0),
    ("nvme_read", "model.layers.0", "F", 1.0, 3.0, 0.0, 300),
    ("compute", "model.layers.0", "F", 2.0, 5.0, 1.0, 0),
    ("compute", "model.layers.0", "B", 5.0, 8.0, 0.0, 0),
    ("nvme_read", "model.embed_tokens", "B", 5.0, 6.0, 0.0, 100),
    ("compute", "model.embed_tokens", "B", 8.0, 9.0, 0.0, 0),
]


@dataclasses.dataclass(frozen=True)
class Record:
    op_id: int
    kind: str
    lane: str
    block: str
    direction: str
    start_s: float
    end_s: float
    num_bytes: int
    step: int
    wait_s: float = 0.0
    is_miss: bool = False


@dataclasses.dataclass(frozen=True)
class WithoutWait:
    lane: str
    block: str
    direction: str
    start_s: float
    end_s: float
    num_bytes: int
    step: int


def trace_of(*starts, rows=STEP, directions="FB", first_step=1):
    """The same step again and again, beginning at `starts`."""
    return [
        Record(i, "op", lane, block, way, at + start, at + end, num_bytes, step, wait)
        for step, at in enumerate(starts, start=first_step)
        for i, (lane, block, way, start, end, wait, num_bytes) in enumerate(rows)
        if way in directions
    ]


def many_blocks(num_layers, *, slowdown=1, forward_s=0.02, backward_s=0.05, read_s=0.01):
    """A step of `num_layers` layers, an embedding and a head, each read just before its visit.

    The first third takes `slowdown` times as long.
    """
    names = ["embed", *(f"model.layers.{i}" for i in range(num_layers)), "lm_head"]
    rows, now = [], 0.0
    for block, way in [*((n, "F") for n in names), *((n, "B") for n in reversed(names))]:
        wait = read_s / 2
        rows.append(("nvme_read", block, way, now, now + read_s, 0.0, 10**6))
        compute_s = forward_s if way == "F" else backward_s
        end = now + wait + compute_s * (slowdown if len(rows) < 4 * num_layers / 3 else 1)
        rows.append(("compute", block, way, now, end, wait, 0))
        now = end
    return rows


def pixels(path):
    from matplotlib.image import imread

    image = (imread(path)[:, :, :3] * 255).round().astype(int)
    return {tuple(pixel) for row in image for pixel in row}


def blue_rows(path):
    """The pixel rows in which forward's color is seen."""
    from matplotlib.image import imread

    image = (imread(path)[:, :, :3] * 255).round().astype(int)
    return [
        i for i, row in enumerate(image) if (abs(row - rgb(pictures.FORWARD)).sum(1) < 90).any()
    ]


def rgb(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def test_a_step_lasts_until_the_next_one_begins():
    windows = training_steps(trace_of(0, 10, 20))
    assert [w.seconds for w in windows] == [10, 10, 9]


def test_a_step_before_an_evaluation_ends_with_its_own_last_visit():
    trained = trace_of(0)
    evaluated = trace_of(30, directions="F", first_step=2)
    resumed = trace_of(60, first_step=3)
    windows = training_steps(trained + evaluated + resumed)
    assert [(w.step, w.seconds) for w in windows] == [(1, 9), (3, 9)]


def test_waiting_for_weights_is_not_computing():
    rows = trace_of(0, 10)
    assert busy_seconds(rows, "compute", training_steps(rows)[0]) == pytest.approx(7)


def test_work_prefetched_for_the_next_step_is_counted_where_it_happened():
    rows = trace_of(0, 10, 20)
    rows.append(Record(90, "load", "nvme_read", "model.layers.0", "F", 17.0, 21.0, 7, 3))
    seconds = [busy_seconds(rows, "nvme_read", window) for window in training_steps(rows)]
    # By itself each step reads 4 s; of the early read 3 s fall into step 2, and the last second
    # into the time in which step 3 reads anyway.
    assert seconds == pytest.approx([4, 7, 4])


def test_reads_that_overlap_keep_a_lane_busy_once():
    rows = trace_of(0)
    rows.append(Record(50, "load", "nvme_read", "b", "F", 0.5, 2.5, 5, 1))
    assert busy_seconds(rows, "nvme_read", training_steps(rows)[0]) == pytest.approx(4)


def test_a_record_without_wait_is_as_good():
    rows = [
        WithoutWait(lane, block, way, start, end, num_bytes, 1)
        for lane, block, way, start, end, _, num_bytes in STEP
    ]
    assert busy_seconds(rows, "compute", training_steps(rows)[0]) == pytest.approx(9)
    assert report.timeline_figure(rows).axes


def test_a_trace_without_training_is_refused(tmp_path):
    with pytest.raises(report.ReportError, match="no training step"):
        report.timeline_figure([])
    with pytest.raises(report.ReportError, match="no training step 9"):
        report.draw_timeline(trace_of(0), tmp_path / "t.png", step=9)
    assert list(tmp_path.iterdir()) == []


def test_steps_of_forward_passes_alone_are_drawn_without_a_turn():
    rows = trace_of(0, 10, 20, directions="F")
    assert [w.seconds for w in training_steps(rows)] == [10, 10, 5]
    figure = report.timeline_figure(rows)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Step 2: 2 blocks, forward, in 10 s"
    assert "backward" not in [text.get_text() for text in axes.texts]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["forward", "idle", "compute waits for weights"]


def test_a_table_puts_numbers_right_and_text_left():
    table = report.format_table([("a", 5), ("long", 1234)], header=("name", "n"))
    assert table.splitlines() == ["name     n", "a        5", "long  1234"]


def test_what_was_not_measured_is_not_printed():
    table = report.summary_table({"loss_last": 1.0, "eval_loss": 2.0}, report.Memory(weights=10**9))
    assert table == "memory  weights 1.00 GB when all are in memory"


MEASURED = {
    "loss_first": 2.5,
    "loss_last": 1.25,
    "eval_loss_first": 2.4,
    "eval_loss": 1.5,
    "train_tokens_per_second": 1234.4,
    "step_seconds": 9.5,
    "busy_share": {"nvme_read": 0.4, "compute": 0.737},
    "bound_by": "compute",
    "ratio_to_limit": 1.357,
    "read_bytes_per_step": 500_000_000,
    "stall_seconds_per_step": 0.25,
}


def test_the_table_says_all_that_was_measured():
    memory = report.Memory(
        weights=400_000_000, budget=100_000_000, peak=900_000_000, before=700_000_000
    )
    table = report.summary_table(MEASURED, memory, files_untouched=True)
    for part in (
        "2.500 → 1.250",
        "2.400 → 1.500",
        "1,234 tokens/s, 9.50 s a step",
        "400 MB when all are in memory, 100 MB allowed here (25%)",
        "900 MB, 200 MB of it",
        "NVMe read 40.0% · compute 73.7%",
        "1.36 × the time that compute alone takes",
        "500 MB a step from the model's own files, 0.25 s waited for it",
        "untouched",
    ):
        assert part in table
    starts = {line.index("2.") for line in table.splitlines()[:2]}
    assert len(starts) == 1, "values don't stand under one another"


def test_weights_that_grow_in_memory_are_told_with_their_files():
    memory = report.Memory(weights=2 * 10**9, files=10**9, budget=10**8)
    line = "2.00 GB when all are in memory as they compute (1.00 GB in the files), 100 MB allowed"
    assert line in report.summary_table({}, memory)
    same = report.Memory(weights=10**9, files=10**9)
    assert "in the files" not in report.summary_table({}, same)


def test_a_changed_model_file_is_shouted():
    memory = report.Memory(weights=10**9)
    assert "CHANGED" in report.summary_table(MEASURED, memory, files_untouched=False)


def test_the_timeline_shows_waits_and_misses_only_where_there_were_some(tmp_path):
    path = tmp_path / "made" / "timeline.png"
    rows = trace_of(0, 10, 20, 30)
    missed = [dataclasses.replace(r, is_miss=r.lane == "nvme_read") for r in rows]
    report.draw_timeline(missed, path)
    seen = pixels(path)
    assert {
        rgb(c) for c in (pictures.FORWARD, pictures.BACKWARD, timeline.WAIT, timeline.IDLE)
    } <= seen
    assert rgb(timeline.MISS) in seen

    report.draw_timeline([dataclasses.replace(r, wait_s=0.0) for r in rows], path)
    seen = pixels(path)
    assert rgb(timeline.MISS) not in seen
    labels = [t.get_text() for t in report.timeline_figure(rows).legends[0].get_texts()]
    assert labels == ["forward", "backward", "idle", "compute waits for weights"]


@pytest.mark.parametrize("slowdown", [1, 20])
@pytest.mark.parametrize("num_layers", [1, 6, 30, 126])
def test_no_two_texts_of_a_timeline_overlap(num_layers, slowdown):
    rows = many_blocks(num_layers, slowdown=slowdown)
    length = rows[-1][4] * 1.05
    figure = report.timeline_figure(trace_of(0, length, 2 * length, rows=rows))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = {text: text.get_window_extent() for text in [*axes.texts, *axes.get_yticklabels()]}
    boxes = {text: box for text, box in boxes.items() if text.get_text()}
    assert len(boxes) >= 6
    for (one, first), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not first.overlaps(second), (one.get_text(), other.get_text())


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ("model.layers.17", "17"),
        ("transformer.h.3", "3"),
        ("model.embed_tokens", "E"),
        ("transformer.wte", "E"),
        ("lm_head", "H"),
        ("visual.merger", "merger"),
    ],
)
def test_blocks_have_names_that_fit_a_bar(block, name):
    assert timeline.short_block_name(block) == name


def test_the_loss_curve_needs_a_loss(tmp_path):
    with pytest.raises(report.ReportError, match="no loss"):
        report.draw_loss([{"step": 1, "grad_norm": 0.1}], tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_short_work_is_still_seen(tmp_path):
    rows = many_blocks(6, forward_s=5.0, backward_s=9.0, read_s=0.004)
    length = rows[-1][4] * 1.05
    path = tmp_path / "timeline.png"
    without = [row for row in rows if row[0] == "compute"]
    report.draw_timeline(trace_of(0, length, rows=rows), path)
    with_reads = blue_rows(path)
    report.draw_timeline(trace_of(0, length, rows=without), path)
    assert len(with_reads) > 1.5 * len(blue_rows(path))


def test_the_loss_curve_shows_training_and_what_was_held_out(tmp_path):
    log = [{"step": i, "loss": 3.0 - i / 10} for i in range(1, 9)]
    report.draw_loss(log, tmp_path / "loss.png")
    assert rgb(pictures.FORWARD) in pixels(tmp_path / "loss.png")
    assert rgb(pictures.BACKWARD) not in pixels(tmp_path / "loss.png")
    report.draw_loss([*log, {"step": 8, "eval_loss": 2.4}], tmp_path / "loss.png")
    assert rgb(pictures.BACKWARD) in pixels(tmp_path / "loss.png")
