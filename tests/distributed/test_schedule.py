import pytest
from hypothesis import given
from hypothesis import strategies as st

from evatok.distributed.schedule import Schedule, Shard, shard_ranges


def shards(count, items=4):
    return [Shard(f"{i:04d}.parquet", items, None) for i in range(count)]


@given(st.integers(0, 5000), st.integers(1, 300))
def test_ranges_cover_every_item_once_in_order(count, size):
    ranges = shard_ranges(count, size)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(count))
    assert all(0 < stop - start <= size for start, stop in ranges)


def test_last_ranges_are_smaller_so_that_no_shard_holds_the_end():
    sizes = [stop - start for start, stop in shard_ranges(1000, 16)]
    assert sizes[0] == 16
    assert sizes[-10:] == [4] * 9 + [1]


def test_window_bounds_what_is_submitted_and_shrinks_with_the_cluster():
    schedule = Schedule(shards(20), retries=0)
    started = [schedule.start(0.0, slots=3) for _ in range(10)]
    assert sum(attempt is not None for attempt in started) == 6
    schedule.done(started[0], 1.0)
    assert schedule.start(1.0, slots=1) is None


def test_a_failing_shard_is_retried_first_and_given_up_after_its_retries():
    schedule = Schedule(shards(3), retries=2)
    first = schedule.start(0.0, 1)
    for _ in range(2):
        assert schedule.failed(first)
        again = schedule.start(0.0, 1)
        assert again.shard is first.shard
        first = again
    assert not schedule.failed(first)
    assert schedule.start(0.0, 1).shard is not first.shard
    assert schedule.retried == 2


def test_a_shard_that_failed_of_what_may_pass_is_tried_again_after_ever_longer_pauses():
    schedule = Schedule(shards(1), retries=3)
    now, pauses = 0.0, []
    for _ in range(3):
        assert schedule.failed(schedule.start(now, 1), rest_from=now)
        assert schedule.open
        failed_at = now
        while (attempt := schedule.start(now, 1)) is None:
            now += 1
        pauses.append(now - failed_at)
        schedule.lost(attempt)
    assert pauses == sorted(set(pauses))
    assert sum(pauses) > 60  # a busy storage is given a minute


def test_a_shard_lost_with_its_node_is_never_given_up():
    schedule = Schedule(shards(1), retries=0)
    for _ in range(10):
        schedule.lost(schedule.start(0.0, 1))
    assert schedule.done(schedule.start(0.0, 1), 1.0)
    assert not schedule.open


def test_a_straggler_gets_one_copy_at_the_end_and_the_first_result_counts():
    schedule = Schedule(shards(3), retries=0)
    quick, other, slow = (schedule.start(0.0, 4) for _ in range(3))
    schedule.done(quick, 10.0)
    schedule.done(other, 10.0)
    assert schedule.start(29.0, 4) is None
    copy = schedule.start(31.0, 4)
    assert copy.copy
    assert copy.shard is slow.shard
    assert schedule.start(100.0, 4) is None
    assert schedule.done(copy, 10.0)
    assert not schedule.done(slow, 90.0)
    assert not schedule.open


@pytest.mark.parametrize("ending", ["lost", "failed"])
def test_a_copy_that_ends_badly_leaves_the_first_attempt_running(ending):
    schedule = Schedule(shards(2), retries=3)
    quick, slow = schedule.start(0.0, 4), schedule.start(0.0, 4)
    schedule.done(quick, 1.0)
    getattr(schedule, ending)(schedule.start(50.0, 4))
    assert schedule.retried == 0
    assert schedule.open
    assert schedule.done(slow, 60.0)
    assert not schedule.open
