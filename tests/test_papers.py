"""Published figures stay within their tolerance, and the document says what the simulator says now."""

import dataclasses
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import papers  # noqa: E402
from ssdtune.schedule.decisions import Full, gpt_shape  # noqa: E402
from ssdtune.schedule.outlook import full_memory  # noqa: E402


@pytest.fixture(scope="module")
def points() -> list[papers.Point]:
    return papers.all_points()


def test_every_point_is_within_the_tolerance(points: list[papers.Point]) -> None:
    off = {point.what: point.ratio for point in points if abs(point.ratio - 1) > papers.TOLERANCE}
    assert not off
    assert len(points) == 22 + 7 + 2


def test_points_that_nothing_was_fitted_to_are_right_on_average(
    points: list[papers.Point],
) -> None:
    ratios = [p.ratio for p in points if any(f" {n} SSDs" in p.what for n in (2, 3, 6))]
    assert len(ratios) == 9
    assert statistics.geometric_mean(ratios) == pytest.approx(1.0, abs=0.03)


def test_drives_that_read_and_write_at_once_would_not_explain_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taking_turns = papers.lohan_machine
    monkeypatch.setattr(
        papers,
        "lohan_machine",
        lambda n: dataclasses.replace(taking_turns(n), is_drive_shared=False),
    )
    assert papers.lohan("13B", 1, 32) > 1.3 * papers.LOHAN_BY_SSDS["13B", 1][32]
    assert papers.lohan("175B", 12, 16) > 1.4 * papers.LOHAN_BY_BATCH["175B", 12][16]


def test_a_batch_that_ran_out_of_memory_does_so_here() -> None:
    """LoHan, 175B: 16 sequences ran on 768 GB of RAM and 24 of the device, 32 did not."""
    fits, does_not = (
        full_memory(gpt_shape(96, 12288, batch * 1024), Full(recompute_share=0.0))
        for batch in (16, 32)
    )
    assert fits.ram < 768e9
    assert fits.device < 24e9
    assert does_not.ram > 768e9


def test_the_document_has_the_table_of_today(points: list[papers.Point]) -> None:
    text = (ROOT / "docs" / "papers.md").read_text()
    missing = [line for line in papers.table_lines(points) if line not in text]
    missing += [line for line in papers.wear_lines() if line not in text]
    missing += [line for line in papers.footer_lines() if line not in text]
    assert not missing, "run benchmarks/papers.py and copy its tables"
    assert max(len(line) for line in text.splitlines()) <= 120


def test_megatrains_figures_fit_no_one_set_of_rates() -> None:
    """Why they are no row of the table: four GPUs take less for four times the tokens, and one takes far longer than
    its compute and an optimizer by itself."""
    assert papers.megatrain_published_s(4) < papers.megatrain_published_s(1)
    assert papers.megatrain_s() < 0.7 * papers.megatrain_published_s(1)
