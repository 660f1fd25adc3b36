"""The order of clips: a permutation per epoch, cut anywhere, the same everywhere."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evatok.video.order import ClipOrder, MixedOrder


@settings(max_examples=60, deadline=None)
@given(clips=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 10**6))
def test_every_epoch_shows_every_clip_once(clips, seed, epoch):
    rows = ClipOrder(clips, seed).rows(epoch * clips, clips)
    np.testing.assert_array_equal(np.sort(rows), np.arange(clips))


@settings(max_examples=60, deadline=None)
@given(clips=st.integers(1, 500), start=st.integers(0, 10**9), cut=st.integers(0, 700))
def test_any_stretch_can_be_cut_out_of_the_order(clips, start, cut):
    order = ClipOrder(clips, seed=3)
    whole = order.rows(start, 700)
    np.testing.assert_array_equal(
        np.concatenate([order.rows(start, cut), order.rows(start + cut, 700 - cut)]), whole
    )


def test_the_order_never_changes_between_versions():
    assert ClipOrder(10, seed=0).rows(0, 20).tolist() == [
        9,
        8,
        2,
        5,
        3,
        4,
        0,
        7,
        1,
        6,
        0,
        6,
        3,
        1,
        2,
        8,
        5,
        9,
        4,
        7,
    ]


def test_epochs_and_seeds_give_unrelated_orders():
    clips = 20_000
    orders = [
        ClipOrder(clips, 0).rows(0, clips),
        ClipOrder(clips, 0).rows(clips, clips),
        ClipOrder(clips, 1).rows(0, clips),
    ]
    for number, one in enumerate(orders):
        for other in [np.arange(clips), *orders[:number]]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
            assert (one == other).sum() < 10
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.03


def test_every_clip_is_equally_likely_at_every_place():
    seen = np.bincount([ClipOrder(50, seed).rows(7, 1)[0] for seed in range(2000)], minlength=50)
    assert ((seen - 40) ** 2 / 40).sum() < 49 + 5 * np.sqrt(2 * 49)


def test_ten_million_clips_are_shuffled_in_seconds_and_little_memory():
    tracemalloc.start()
    started = time.process_time()
    rows = ClipOrder(10_000_000, seed=1).rows(0, 10_000_000)
    seconds = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 10_000_000
    assert peak < 200 * 2**20
    assert seconds < 60


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one clip"):
        ClipOrder(0, 0)


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 10**7), cut=st.integers(0, 900))
def test_a_mixture_can_be_cut_anywhere_too(start, cut):
    order = MixedOrder((300, 7, 1500), (1.0, 2.0, 0.5), seed=4)
    whole = order.rows(start, 900)
    np.testing.assert_array_equal(
        np.concatenate([order.rows(start, cut), order.rows(start + cut, 900 - cut)]), whole
    )


def test_a_mixture_keeps_the_weights_in_every_stretch_and_shows_all_clips_of_a_source_in_turn():
    order = MixedOrder((300, 7, 1500), (1.0, 2.0, 1.0), seed=4)
    assert order.clips == 1807
    rows = order.rows(12_000, 20_000)
    source = np.searchsorted([300, 307], rows, side="right")
    np.testing.assert_allclose(np.bincount(source) / len(rows), [0.25, 0.5, 0.25], atol=0.002)
    for low in range(0, 20_000, 2_000):
        share = np.bincount(source[low : low + 2_000], minlength=3) / 2_000
        np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=0.05)
    for number in range(3):
        counts = np.unique(rows[source == number], return_counts=True)[1]
        assert len(counts) == order.parts[number]
        # Only clips near the ends of the stretch may be one epoch ahead or behind.
        assert counts.max() - counts.min() <= 3


def test_weights_that_make_no_sense_are_refused():
    for parts, weights in (((10, 10), (1.0,)), ((10, 10), (0.0, 1.0)), ((), ()), ((10, 10), (1.0, 3000.0))):
        with pytest.raises(ValueError, match="weight"):
            MixedOrder(parts, weights, seed=0)


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 10**6), cut=st.integers(0, 900), run=st.integers(1, 50))
def test_a_turn_takes_as_many_positions_as_it_is_asked_to_wherever_the_order_is_cut(start, cut, run):
    order = MixedOrder((300, 7, 1500), (1.0, 2.0, 1.0), seed=4, run=run)
    rows = order.rows(start, 900)
    np.testing.assert_array_equal(
        np.concatenate([order.rows(start, cut), order.rows(start + cut, 900 - cut)]), rows
    )
    turn = np.arange(start, start + 900) // run
    source = np.searchsorted([300, 307], rows, side="right")
    assert all(len(set(source[turn == number])) == 1 for number in np.unique(turn))


def test_long_turns_keep_the_weights_and_show_all_clips_of_a_source_in_turn():
    order = MixedOrder((300, 7, 1500), (1.0, 2.0, 1.0), seed=4, run=8)
    rows = order.rows(0, 8000)
    source = np.searchsorted([300, 307], rows, side="right")
    assert np.bincount(source).tolist() == [2000, 4000, 2000]
    for number in range(2):
        counts = np.unique(rows[source == number], return_counts=True)[1]
        assert len(counts) == order.parts[number]
        assert counts.max() - counts.min() <= 1
