"""What a run's report claims, held against traces small enough to reckon by hand."""

import dataclasses
import itertools

import pytest

from ssdtune import report

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


@dataclasses.dataclass(frozen=True)
class WithoutWait:
    op_id: int
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


def many_blocks(num_layers, *, forward_s=0.02, backward_s=0.05, read_s=0.01):
    """A step of `num_layers` layers, an embedding and a head, each read just before its visit."""
    names = ["embed", *(f"model.layers.{i}" for i in range(num_layers)), "lm_head"]
    rows, now = [], 0.0
    for block, way in [*((n, "F") for n in names), *((n, "B") for n in reversed(names))]:
        wait = read_s / 2
        rows.append(("nvme_read", block, way, now, now + read_s, 0.0, 10**6))
        end = now + wait + (forward_s if way == "F" else backward_s)
        rows.append(("compute", block, way, now, end, wait, 0))
        now = end
    return rows


def pixels(path):
    from matplotlib.image import imread

    image = (imread(path)[:, :, :3] * 255).round().astype(int)
    return {tuple(pixel) for row in image for pixel in row}


def rgb(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def test_a_step_lasts_until_the_next_one_begins():
    windows = report.training_steps(trace_of(0, 10, 20))
    assert [w.seconds for w in windows] == [10, 10, 9]


def test_a_step_before_an_evaluation_ends_with_its_own_last_visit():
    trained = trace_of(0)
    evaluated = trace_of(30, directions="F", first_step=2)
    resumed = trace_of(60, first_step=3)
    windows = report.training_steps(trained + evaluated + resumed)
    assert [(w.step, w.seconds) for w in windows] == [(1, 9), (3, 9)]


def test_waiting_for_weights_is_not_computing():
    summary = report.summarize_trace(trace_of(0, 10, 20))
    assert summary.busy_s["compute"] == pytest.approx(7)
    assert summary.stall_s == pytest.approx(2)


def test_the_first_step_counts_only_when_it_is_alone():
    slow = trace_of(0, rows=[(*row[:3], row[3] * 5, row[4] * 5, *row[5:]) for row in STEP])
    steady = trace_of(100, 110, first_step=2)
    assert report.summarize_trace(slow + steady).step_s == pytest.approx(9.5)
    assert report.summarize_trace(slow).step_s == pytest.approx(45)


def test_work_prefetched_for_the_next_step_is_counted_where_it_happened():
    early = Record(90, "load", "nvme_read", "model.layers.0", "F", 17.0, 19.0, 7, 3)
    rows = trace_of(0, 10, 20)
    summary = report.summarize_trace([*rows, early])
    # Steps 2 and 3 read 4 s by themselves; the early read adds 2 s to step 2 alone.
    assert summary.busy_s["nvme_read"] == pytest.approx(5)


def test_reads_that_overlap_keep_a_lane_busy_once():
    twin = [Record(50, "load", "nvme_read", "b", "F", 10.5, 12.5, 5, 2)]
    summary = report.summarize_trace(trace_of(0, 10) + twin)
    assert summary.busy_s["nvme_read"] == pytest.approx(4)


def test_the_limit_is_the_busiest_lane():
    summary = report.summarize_trace(trace_of(0, 10, 20))
    assert summary.bound_by == "compute"
    assert summary.ratio_to_limit == pytest.approx(9.5 / 7)
    assert list(summary.shares) == ["nvme_read", "compute"]
    assert summary.read_bytes == 500


def test_fetches_that_no_plan_named_are_misses():
    rows = trace_of(0, 10)
    on_demand = dataclasses.replace(rows[-2], op_id=-1)
    assert on_demand.lane == "nvme_read"
    assert report.summarize_trace([*rows, on_demand]).num_misses == 1


def test_a_record_without_wait_is_as_good():
    rows = [
        WithoutWait(i, lane, block, way, start, end, num_bytes, 1)
        for i, (lane, block, way, start, end, _, num_bytes) in enumerate(STEP)
    ]
    assert report.summarize_trace(rows).busy_s["compute"] == pytest.approx(9)


def test_a_trace_without_training_is_refused(tmp_path):
    forward_only = trace_of(0, 10, directions="F")
    for act in (report.summarize_trace, report.timeline_figure):
        with pytest.raises(report.ReportError, match="no training step"):
            act(forward_only)
    with pytest.raises(report.ReportError, match="no training step 9"):
        report.draw_timeline(trace_of(0), tmp_path / "t.png", step=9)
    assert list(tmp_path.iterdir()) == []


def test_a_table_puts_numbers_right_and_text_left():
    table = report.format_table([("a", 5), ("long", 1234)], header=("name", "n"))
    assert table.splitlines() == ["name     n", "a        5", "long  1234"]


def test_what_was_not_measured_is_not_printed():
    run = report.RunSummary(loss_before=2, loss_after=1, tokens_per_s=None, weights_bytes=10**9)
    table = report.summary_table(run, report.summarize_trace(trace_of(0, 10)))
    for absent in ("tokens/s", "held-out", "peak", "allowed", "model files", "None"):
        assert absent not in table


def test_the_table_says_all_that_was_measured():
    run = report.RunSummary(
        loss_before=2.5,
        loss_after=1.25,
        tokens_per_s=1234.4,
        weights_bytes=400_000_000,
        budget_bytes=100_000_000,
        peak_bytes=900_000_000,
        own_peak_bytes=200_000_000,
        eval_loss_before=2.4,
        eval_loss_after=1.5,
        files_untouched=True,
    )
    table = report.summary_table(run, report.summarize_trace(trace_of(0, 10, 20)))
    for part in (
        "2.500 → 1.250",
        "2.400 → 1.500",
        "1,234 tokens/s, 9.50 s a step",
        "400 MB when all are in memory, 100 MB allowed here (25%)",
        "900 MB, 200 MB of it",
        "compute 73.7%",
        "1.36 (9.50 s / 7.00 s of compute)",
        "500 B a step",
        "untouched",
    ):
        assert part in table
    changed = report.summary_table(
        dataclasses.replace(run, files_untouched=False), report.summarize_trace(trace_of(0, 10))
    )
    assert "CHANGED" in changed


def test_the_timeline_shows_waits_and_misses_only_where_there_were_some(tmp_path):
    path = tmp_path / "made" / "timeline.png"
    rows = trace_of(0, 10, 20, 30)
    missed = [dataclasses.replace(r, op_id=-1) if r.lane == "nvme_read" else r for r in rows]
    report.draw_timeline(missed, path)
    seen = pixels(path)
    assert {rgb(c) for c in (report.FORWARD, report.BACKWARD, report.WAIT, report.IDLE)} <= seen
    assert rgb(report.MISS) in seen

    report.draw_timeline([dataclasses.replace(r, wait_s=0.0) for r in rows], path)
    seen = pixels(path)
    assert rgb(report.MISS) not in seen
    labels = [t.get_text() for t in report.timeline_figure(rows).legends[0].get_texts()]
    assert labels == ["forward", "backward", "idle", "compute waits for weights"]


@pytest.mark.parametrize("num_layers", [1, 6, 30, 126])
def test_no_two_texts_of_a_timeline_overlap(num_layers):
    rows = many_blocks(num_layers)
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
    assert report.short_block_name(block) == name


def test_the_loss_curve_needs_a_loss(tmp_path):
    with pytest.raises(report.ReportError, match="no loss"):
        report.draw_loss([{"step": 1, "grad_norm": 0.1}], tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_the_loss_curve_shows_training_and_what_was_held_out(tmp_path):
    log = [{"step": i, "loss": 3.0 - i / 10} for i in range(1, 9)]
    report.draw_loss(log, tmp_path / "loss.png")
    assert rgb(report.FORWARD) in pixels(tmp_path / "loss.png")
    assert rgb(report.BACKWARD) not in pixels(tmp_path / "loss.png")
    report.draw_loss([*log, {"step": 8, "eval_loss": 2.4}], tmp_path / "loss.png")
    assert rgb(report.BACKWARD) in pixels(tmp_path / "loss.png")
