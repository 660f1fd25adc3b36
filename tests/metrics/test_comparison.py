import json
from dataclasses import replace

import numpy as np
import pytest

from evatok.metrics.comparison import Comparison, Point

CHOICES = (8, 16, 32, 64)
CLIPS = 60


def point(policy: str, assignment: np.ndarray, difficulty: np.ndarray, **changes) -> Point:
    tokens = assignment.sum(1)
    loss = difficulty / np.sqrt(tokens)
    known = {"label": "", "knob": None, "headline": True, "deployable": True}
    return Point(
        policy=policy,
        assignment=assignment,
        quality={"dssim": loss, "psnr": -10 * np.log10(loss)},
        final={"dssim": 2 * loss},
        reward=-loss - tokens / 1000,
        **{**known, **changes},
    )


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    draws = np.random.default_rng(0)
    difficulty = draws.uniform(0.5, 2, CLIPS)
    points = [
        point("uniform", np.full((CLIPS, 4), k), difficulty, label=str(k), headline=k == 16) for k in CHOICES
    ]
    points += [
        point("static", np.full((CLIPS, 4), k // 2), difficulty / np.sqrt(2), headline=k == 16)
        for k in CHOICES
    ]
    points.append(point("router", np.full((CLIPS, 4), 8), difficulty / np.sqrt(2)))
    return Comparison(points, np.zeros(CLIPS), np.full(CLIPS, -2.0), "dssim", False, seed=0)


@pytest.fixture(scope="module")
def summary(comparison: Comparison) -> dict:
    return comparison.summary()


def test_a_policy_with_the_quality_of_twice_its_tokens_saves_half(summary):
    saving = summary["policies"]["static"]["token_saving_vs_uniform"]
    assert saving["value"] == pytest.approx(50, abs=1e-6)
    assert saving["low"] <= saving["value"] <= saving["high"]


def test_both_tokenizers_have_their_savings(summary):
    entry = summary["policies"]["static"]
    assert entry["final"]["token_saving_vs_uniform"]["value"] == pytest.approx(50, abs=1e-6)
    assert entry["final"]["dssim"] == pytest.approx(2 * entry["dssim"])


def test_a_policy_is_not_compared_with_itself(summary):
    policies = summary["policies"]
    assert policies["uniform"]["token_saving_vs_uniform"] is None
    assert policies["static"]["token_saving_vs_static"] is None


def test_a_policy_of_one_setting_is_compared_at_its_own_quality(summary):
    saving = summary["policies"]["router"]["token_saving_vs_uniform"]
    assert saving["value"] == pytest.approx(50, abs=1e-6)


def test_clips_are_resampled_for_both_curves_at_once(summary):
    # Difficulties differ widely between clips, the saving on each of them does not: no spread remains.
    saving = summary["policies"]["static"]["token_saving_vs_uniform"]
    assert saving["high"] - saving["low"] < 1e-6


def test_the_percentile_is_a_ratio_of_expectations(comparison, summary):
    router = comparison.points[-1]
    expected = 100 * (router.reward.mean() + 2) / 2
    entry = summary["policies"]["router"]
    assert entry["reward_percentile"] == pytest.approx(expected)
    interval = entry["reward_percentile_interval"]
    assert interval["low"] < expected < interval["high"]


def test_the_regret_of_half_and_of_nine_in_ten_clips_is_bounded_by_its_quantiles(comparison, summary):
    router = comparison.points[-1]
    regret = np.sort(comparison.best - router.reward)
    found = summary["policies"]["router"]["regret"]
    assert regret[29] <= found["median"] <= regret[30]
    assert regret[53] <= found["90"] <= regret[54]


def test_the_headline_names_the_best_uniform_and_whether_more_tokens_help(comparison, summary):
    head = summary["headline"]
    uniforms = [p for p in comparison.points if p.policy == "uniform"]
    best = max(uniforms, key=lambda p: p.reward.mean())
    assert head["best_uniform"]["label"] == best.label
    assert head["rises_with_tokens"] is True
    assert head["oracle_beats_uniforms"] is True
    assert [row["tokens"] for row in head["quality_by_tokens"]] == [32, 64, 128, 256]


def test_the_single_point_figure_takes_the_uniform_of_nearest_quality(summary):
    single = summary["headline"]["single_point"]
    assert single["reference"] == "16"  # the router's quality at 32 tokens is uniform's at 64
    assert single["tokens_percent"] == pytest.approx(-50)


@pytest.mark.parametrize(("ease", "reference"), [(1.9, "8"), (2.1, "16"), (1.0, None)])
def test_the_single_point_figure_takes_no_uniform_that_is_better(comparison, ease, reference):
    # The router has the quality of uniform at ``ease`` times its 32 tokens.
    uniforms = [point for point in comparison.points if point.policy == "uniform"]
    difficulty = uniforms[0].quality["dssim"] * np.sqrt(uniforms[0].tokens)
    router = point("router", np.full((CLIPS, 4), 8), difficulty / np.sqrt(ease))
    found = replace(comparison, points=[*uniforms[bool(reference is None) :], router]).summary()
    single = found["headline"]["single_point"]
    assert (single and single["reference"]) == reference


def test_a_saving_at_the_setting_is_that_at_its_own_quality_and_not_along_the_curve(comparison):
    # Twice as good as uniform at the setting that is quoted, no better anywhere else.
    uniforms = [point for point in comparison.points if point.policy == "uniform"]
    difficulty = uniforms[0].quality["dssim"] * np.sqrt(uniforms[0].tokens)
    router = [
        point("router", np.full((CLIPS, 4), k), difficulty / (1.414214 if k == 16 else 1), headline=k == 16)
        for k in CHOICES
    ]
    entry = replace(comparison, points=[*uniforms, *router]).summary()["policies"]["router"]
    assert entry["token_saving_at_setting_vs_uniform"]["value"] == pytest.approx(50, abs=1e-3)
    assert entry["token_saving_vs_uniform"]["value"] < 45


def test_every_point_has_means_and_intervals_and_all_is_json(comparison, summary):
    policies = comparison.policies()
    json.dumps([policies, summary])
    assert len(policies["uniform"]["points"]) == 4
    entry = policies["static"]["points"][0]
    low, high = entry["intervals"]["dssim"]
    assert low < entry["dssim"] < high
    assert entry["final"]["dssim"] == pytest.approx(2 * entry["dssim"])


def test_the_same_clips_give_the_same_numbers_to_the_last_digit(comparison, summary):
    assert comparison.summary() == summary
