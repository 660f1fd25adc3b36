import math
from itertools import pairwise

import pytest

from evatok.report import figures
from evatok.report.svg import Scale, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (math.nan, "\u2013"),
        (0.0, "0"),
        (0.12345, "0.123"),
        (-1.5, "\u22121.50"),
        (1234567, "1\u2009234\u2009567"),
        (96.96, "97.0"),
        (1e-7, "1.00e\u221207"),
    ],
)
def test_numbers_keep_three_digits(value, text):
    assert number(value) == text


def test_a_scale_maps_its_ends_and_its_middle():
    scale = Scale(128, 2048, 0, 100, log=2)
    assert [scale(v) for v in (128, 512, 2048)] == pytest.approx([0, 50, 100])
    assert [label for _, label in scale.labelled_ticks(6)] == [
        "128",
        "256",
        "512",
        "1\u2009024",
        "2\u2009048",
    ]


@pytest.mark.parametrize("values", [[], [3.0], [0.0], [math.nan, 2.0], [-5.0, 5.0], [1e-9, 1e9]])
def test_every_set_of_values_has_a_scale_with_ticks_inside(values):
    scale = Scale.over(values, 0, 100)
    assert len(scale.ticks()) >= 2
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())


def test_the_front_follows_the_best_curve_and_never_falls():
    cheap = [(100.0, 2.0), (200.0, 3.0)]
    dear = [(100.0, 1.0), (400.0, 6.0)]
    front = figures.pareto_front([cheap, dear, [(300.0, 0.0)]], higher_is_better=True)
    assert front[0] == (100, 2)
    assert front[-1] == (400, pytest.approx(6))
    assert all(b[1] >= a[1] for a, b in pairwise(front))
    assert dict(front)[200.0] == pytest.approx(3.5)  # halfway in log tokens on the dear curve


def test_the_front_of_a_loss_is_its_lower_edge():
    front = figures.pareto_front([[(1.0, 0.5), (2.0, 0.3)], [(1.0, 0.4)]], higher_is_better=False)
    assert front[0] == (1, 0.4)
    assert front[-1] == (2, pytest.approx(0.3))


def test_long_curves_are_thinned_without_losing_their_mean_or_their_end():
    points = [(float(i), float(i % 7)) for i in range(10_001)]
    thinned = figures.thin(points)
    assert len(thinned) <= 242
    assert thinned[-1] == points[-1]
    assert sum(v for _, v in thinned[:-1]) / len(thinned[:-1]) == pytest.approx(3, abs=0.05)


def test_every_value_falls_into_one_bin_the_largest_too():
    drawn = figures.histogram("router", [0, 5, 10], [0, 5, 10], "tokens")
    assert "1 of 3 clips" in drawn
    assert "2 of 3 clips" in drawn


def test_values_that_are_not_finite_do_not_reach_the_figure():
    drawn = figures.curve_panel("loss", {"train": [(0, 1.0), (1, math.nan), (2, math.inf), (3, 0.5)]})
    assert "nan" not in drawn
    assert "inf" not in drawn
