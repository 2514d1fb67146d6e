"""Curves through what was measured, the line fitted to them, and products of few rows."""

import pytest

from ssdtune.schedule.curve import Curve, ProfileError, curve_from, curve_of
from ssdtune.schedule.products import seconds_in


def test_a_curve_is_straight_between_what_was_measured() -> None:
    curve = Curve(((10.0, 1.0), (20.0, 2.0), (40.0, 3.0)))
    assert curve.seconds(0) == 0
    assert curve.seconds(1) == 1.0, "latency"
    assert curve.seconds(15) == pytest.approx(1.5)
    assert curve.seconds(30) == pytest.approx(2.5)
    assert curve.seconds(80) == pytest.approx(6.0), "the last rate goes on"
    assert curve.rate == pytest.approx(40 / 3)


def test_noise_does_not_make_larger_work_faster() -> None:
    assert curve_of([(30, 2.0), (10, 1.0), (20, 2.5)]).points == ((10, 1.0), (20, 2.5), (30, 2.5))


def test_the_slow_end_of_each_point_is_kept_and_never_below_the_middle() -> None:
    curve = curve_of([(10, 1.0, 1.5), (20, 2.0, 1.2), (30, 1.9, 4.0)])
    assert curve.points == ((10, 1.0), (20, 2.0), (30, 2.0))
    assert curve.slow == (1.5, 2.0, 4.0)
    assert curve.at_p90.seconds(25) == pytest.approx(3.0)
    assert Curve(((1.0, 1.0),)).at_p90 == Curve(((1.0, 1.0),)), "not known: the middle"


def test_a_line_has_the_latency_and_rate_that_made_it() -> None:
    curve = Curve(tuple((size, 1e-3 + size / 2e9) for size in (1e6, 4e6, 16e6, 32e6, 64e6)))
    assert curve.line.latency_s == pytest.approx(1e-3)
    assert curve.line.rate == pytest.approx(2e9)


def test_one_point_that_met_another_process_does_not_turn_the_line() -> None:
    points = [(size, 1e-3 + size / 2e9) for size in (1e6, 4e6, 16e6, 32e6, 64e6)]
    points[3] = (32e6, 5 * points[3][1])
    curve = Curve(tuple(points))
    assert curve.line.rate == pytest.approx(2e9, rel=0.05)
    assert curve.line.latency_s == pytest.approx(1e-3, rel=0.2)


def test_a_line_through_one_point_or_through_level_ones_has_no_latency() -> None:
    assert Curve(((10.0, 2.0),)).line == (0.0, 5.0)
    assert Curve(((10.0, 2.0), (20.0, 2.0))).line == (0.0, 10.0)


def test_a_curve_survives_its_file() -> None:
    for curve in (Curve(((1.0, 2.0), (3.0, 4.0)), (2.5, 6.0)), Curve(((1.0, 2.0),))):
        assert curve_from(curve.listed(), "p.yaml: x") == curve


@pytest.mark.parametrize(
    "found",
    [
        [[1, 2, 1]],  # p90 below p50
        [[1, 2, 3], [2, 3]],  # not all alike
        [[1, 2, 3, 4]],
        [[1]],
        [[1, 2, float("inf")]],
    ],
)
def test_a_bad_curve_is_refused_by_entry(found: list[list[float]]) -> None:
    with pytest.raises(ProfileError, match=r"p\.yaml: x: must be a list of \[size, p50\]"):
        curve_from(found, "p.yaml: x")


# ------------------------------------------------------------------ few rows

# A row by a matrix of n elements takes n x 1e-9 s, each further row a tenth of that. FLOP: 2 x rows x n.
MATRICES = (1e6, 1e8)
GRID = {
    rows: Curve(tuple((2 * rows * n, n * 1e-9 * (1 + 0.1 * (rows - 1))) for n in MATRICES))
    for rows in (1, 16, 64)
}
PLAIN = Curve(((1e6, 1e-6), (1e12, 1.0)))  # 1e12 FLOP/s


@pytest.mark.parametrize("elements", [1e6, 5e7, 1e8, 4e8])
@pytest.mark.parametrize("rows", [1, 8, 16, 40, 64])
def test_few_rows_take_what_rows_and_matrix_say(elements: float, rows: int) -> None:
    found = seconds_in(GRID, PLAIN, 2 * rows * elements, rows)
    assert found == pytest.approx(elements * 1e-9 * (1 + 0.1 * (rows - 1)))


def test_beyond_the_rows_measured_further_ones_run_at_the_rate_of_many() -> None:
    elements = 1e8
    most, more = (seconds_in(GRID, PLAIN, 2 * rows * elements, rows) for rows in (64, 1064))
    assert most is not None
    assert more is not None
    assert more - most == pytest.approx(2 * 1000 * elements / 1e12, rel=1e-3)


def test_small_matrices_and_products_of_many_matrices_go_by_their_flop() -> None:
    assert seconds_in(GRID, PLAIN, 2 * 16 * 9e5, 16) is None
    assert seconds_in(GRID, PLAIN, 2 * 16 * 1e8, 0) is None
    assert seconds_in({}, PLAIN, 2 * 16 * 1e8, 16) is None


def test_more_rows_never_take_less_time() -> None:
    noisy = {1: Curve(((2e6, 5e-3),)), 4: Curve(((8e6, 4e-3),)), 16: Curve(((32e6, 6e-3),))}
    times = [seconds_in(noisy, PLAIN, 2e6 * rows, rows) for rows in range(1, 40)]
    assert all(t is not None for t in times)
    assert times == sorted(t for t in times if t is not None)
