import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evatok.metrics.curves import Curve, interval, resamples, token_saving

TOKENS = np.array([128.0, 256.0, 512.0, 1024.0, 2048.0])
QUALITY = np.array([-0.30, -0.25, -0.21, -0.19, -0.18])


def saved(tokens, quality, reference_tokens=TOKENS, reference_quality=QUALITY):
    return token_saving(Curve(tokens, quality), Curve(reference_tokens, reference_quality))


def test_half_the_tokens_at_the_same_quality_is_a_saving_of_50_percent():
    assert saved(TOKENS / 2, QUALITY) == pytest.approx(50)


def test_more_tokens_at_the_same_quality_is_a_negative_saving():
    assert saved(TOKENS * 1.25, QUALITY) == pytest.approx(-25)


@given(st.floats(0.1, 10), st.permutations(range(5)))
def test_saving_is_the_common_factor_whatever_the_order_of_points(factor, order):
    order = list(order)
    saving = saved(factor * TOKENS[order], QUALITY[order])
    assert saving == pytest.approx(100 * (1 - factor), abs=1e-9)


def test_straight_lines_in_log_tokens_agree_with_the_closed_form():
    # log2 tokens = 10 q + 5 against 10 q + 5 + q over q in [0.2, 0.6]: the mean gap is the mean of q, 0.4.
    ours, reference = np.array([0.0, 0.6]), np.array([0.2, 1.0])
    saving = saved(2 ** (10 * ours + 5), ours, 2 ** (11 * reference + 5), reference)
    assert saving == pytest.approx(100 * (1 - 2**-0.4))


def test_a_single_point_is_compared_at_its_own_quality():
    saving = saved(np.array([256.0]), QUALITY[2:3])
    assert saving == pytest.approx(50)


def test_curves_without_common_quality_have_no_saving():
    assert np.isnan(saved(TOKENS, QUALITY + 1))


def test_points_that_buy_nothing_are_left_out():
    curve = Curve(np.array([400.0, 100.0, 200.0, 300.0]), np.array([4.0, 2.0, 1.0, 2.0]))
    assert np.exp(curve.logs) == pytest.approx([100, 400])
    assert curve.quality.tolist() == [2, 4]


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = interval(values.mean(), resamples(400, 2000, seed=1) @ values)
    assert found is not None
    assert found.value == values.mean()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.08)


@pytest.mark.parametrize("draws", [[1.0, float("nan"), float("nan")], [float("nan")] * 3])
def test_an_estimate_that_mostly_does_not_exist_has_no_interval(draws):
    assert interval(1.0, draws) is None
    assert interval(float("nan"), [1.0, 1.0]) is None
