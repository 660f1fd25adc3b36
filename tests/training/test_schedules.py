"""Learning rates by step."""

import pytest

from evatok.training.schedules import learning_rate

COSINE = {"steps": 1000, "peak": 1e-4, "final": 1e-6, "warmup": 100, "shape": "cosine", "decay": 0.2}
WSD = COSINE | {"shape": "wsd", "final": 0.0}


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert learning_rate(0, **COSINE) == pytest.approx(1e-6)
    assert learning_rate(49, **COSINE) == pytest.approx(5e-5)
    assert learning_rate(99, **COSINE) == pytest.approx(1e-4)


def test_cosine_ends_at_the_final_rate() -> None:
    assert learning_rate(100, **COSINE) == pytest.approx(1e-4)
    assert learning_rate(999, **COSINE) == pytest.approx(1e-6)
    assert learning_rate(549, **COSINE) == pytest.approx((1e-4 + 1e-6) / 2, rel=0.01)


def test_wsd_is_constant_for_four_fifths_and_then_falls_to_the_final_rate() -> None:
    assert {learning_rate(step, **WSD) for step in range(100, 799)} == {1e-4}
    assert learning_rate(849, **WSD) == pytest.approx(1e-4 * (1 - 0.25**0.5))
    assert learning_rate(999, **WSD) == 0.0
    falling = [learning_rate(step, **WSD) for step in range(799, 1000)]
    assert falling == sorted(falling, reverse=True)
