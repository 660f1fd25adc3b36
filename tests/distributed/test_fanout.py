import errno
import functools
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from evatok.artifacts import Location
from evatok.assignment.table import RewardRows, to_table
from evatok.distributed.fanout import FanOutError, Job, ShardOutput, fan_out, make_shard, read_record
from evatok.distributed.schedule import Shard
from evatok.errors import UserError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def numbers(spec, state):
    start, stop = spec
    value = np.arange(start, stop, dtype=np.float32)
    names = [f"n{i}" for i in value]
    return ShardOutput(pa.table({"n": np.arange(start, stop), "name": names, "v": value * 0.1}))


def plan(count=12, size=2):
    return [Shard(f"{i:04d}.parquet", size, (i * size, (i + 1) * size)) for i in range(count)]


def shard_and_job(folder, work=numbers, key="k"):
    return plan(1)[0], Job(work, None, Location.parse(folder), key)


def test_a_made_shard_is_found_whole_and_not_made_again(tmp_path):
    shard, job = shard_and_job(tmp_path)
    made = make_shard(job, None, shard)
    assert (made.rows, made.kept, made.failure) == (2, False, "")
    assert make_shard(job, None, shard).kept


@pytest.mark.parametrize("change", [{"key": "other"}, {"items": 3}])
def test_a_shard_of_another_key_or_plan_is_not_taken(tmp_path, change):
    shard, job = shard_and_job(tmp_path)
    make_shard(job, None, shard)
    other = Shard(shard.name, change.get("items", shard.items), shard.spec)
    assert read_record(job.target, other, change.get("key", "k")) is None


def test_any_damaged_byte_is_noticed_or_harmless(tmp_path):
    shard, job = shard_and_job(tmp_path)
    make_shard(job, None, shard)
    path = tmp_path / shard.name
    whole = path.read_bytes()
    expected = pq.read_table(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        if read_record(job.target, shard, "k"):
            assert pq.read_table(path).equals(expected), f"damage at byte {at} passed"


def test_a_truncated_shard_is_noticed(tmp_path):
    shard, job = shard_and_job(tmp_path)
    make_shard(job, None, shard)
    path = tmp_path / shard.name
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert read_record(job.target, shard, "k") is None


def noisy_qualities(spec, state):
    """What 8 clips, five metrics and 625 assignments look like to a compressor, at worst."""
    noise = torch.rand(5, 8, 625, generator=torch.Generator().manual_seed(0))
    quality = {f"m{i}": 0.2 + 0.1 * values for i, values in enumerate(noise)}
    clips = [f"clip-{i}" for i in range(8)]
    return ShardOutput(to_table(RewardRows(clips, torch.arange(8), ["train"] * 8, quality)))


def test_a_reward_table_of_100k_clips_and_five_metrics_stays_below_a_gigabyte(tmp_path):
    shard, job = shard_and_job(tmp_path, noisy_qualities)
    make_shard(job, None, shard)
    assert (tmp_path / shard.name).stat().st_size / 8 * 100_000 < 1e9


def rejecting(spec, state):
    bad = {"uri": "b.mp4", "code": "truncated", "detail": "x"}
    return ShardOutput(numbers(spec, state).table.slice(0, 1), [bad])


def test_rejected_items_are_recorded_in_the_shard(tmp_path):
    shard, job = shard_and_job(tmp_path, rejecting)
    made = make_shard(job, None, shard)
    found = read_record(job.target, shard, "k")
    assert made.rejected == found.rejected == ({"uri": "b.mp4", "code": "truncated", "detail": "x"},)
    assert found.rows == 1


def counted_state(folder):
    (Path(folder) / f"{os.getpid()}-{time.monotonic_ns()}").touch()
    return 100


def with_state(spec, state):
    time.sleep(0.05)
    return ShardOutput(pa.table({"n": [spec[0] + state], "pid": [os.getpid()]}))


def test_state_is_built_once_per_worker_process(ray_cluster, tmp_path):
    (tmp_path / "calls").mkdir()
    out = Location.parse(tmp_path / "out")
    fan_out(plan(), with_state, out, key="k", state=functools.partial(counted_state, tmp_path / "calls"))
    table = pq.read_table(tmp_path / "out")
    assert sorted(table["n"].to_pylist()) == [100 + 2 * i for i in range(12)]
    builders = [name.split("-")[0] for name in os.listdir(tmp_path / "calls")]
    assert len(builders) == len(set(builders))
    assert {str(pid) for pid in table["pid"].to_pylist()} <= set(builders)


def own_name(spec, state):
    return ShardOutput(pa.table({"name": [ray.get_runtime_context().get_task_name()]}))


def test_tasks_bear_the_name_of_their_work(ray_cluster, tmp_path):
    target = Location.parse(tmp_path)
    fan_out(plan(1), own_name, target, key="k")
    assert target.read_table("0000.parquet")["name"].to_pylist() == ["test_fanout:own_name"]


def test_a_rerun_keeps_whole_shards_and_mends_damaged_and_foreign_ones(ray_cluster, tmp_path):
    target = Location.parse(tmp_path)
    fan_out(plan(), numbers, target, key="k")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "0003.parquet").write_bytes(before["0003.parquet"][:-9])
    (tmp_path / "0004.parquet").unlink()
    (tmp_path / "9999.parquet").write_bytes(b"of another plan")
    seen = []
    summary = fan_out(plan(), numbers, target, key="k", on_progress=seen.append)
    assert summary.kept == 20
    assert summary.rows == 24
    assert (seen[-1].items, seen[-1].total, seen[-1].left) == (24, 24, 0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def dying_once(spec, folder):
    if spec[0] == 6 and not (mark := Path(folder) / "died").exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    if spec[0] == 8 and not (mark := Path(folder) / "raised").exists():
        mark.touch()
        raise RuntimeError("once")
    return numbers(spec, None)


def test_killed_workers_and_errors_that_pass_are_retried(ray_cluster, tmp_path):
    (tmp_path / "marks").mkdir()
    target = Location.parse(tmp_path / "out")
    summary = fan_out(plan(), dying_once, target, key="k", state=functools.partial(str, tmp_path / "marks"))
    assert summary.retries == 2
    assert sorted(pq.read_table(tmp_path / "out")["n"].to_pylist()) == list(range(24))


def failing_at_six(spec, state):
    if spec[0] == 6:
        raise ValueError("clip six is cursed")
    return numbers(spec, state)


def test_a_shard_that_always_fails_does_not_stop_the_others_and_is_named(ray_cluster, tmp_path):
    with pytest.raises(
        FanOutError, match=r"0003\.parquet(.|\n)*clip six is cursed(.|\n)*11 of 12 shards"
    ) as error:
        fan_out(plan(), failing_at_six, Location.parse(tmp_path), key="k", retries=1)
    assert "the same command" in str(error.value)
    assert len(list(tmp_path.iterdir())) == 11
    assert fan_out(plan(), numbers, Location.parse(tmp_path), key="k").kept == 22


def busy(spec, state):
    raise OSError("503 Slow Down")


def test_a_failure_of_a_storage_may_pass_and_one_of_the_work_does_not(tmp_path):
    for work, passing in ((busy, True), (failing_at_six, False)):
        job = Job(work, None, Location.parse(tmp_path), "k")
        record = make_shard(job, None, Shard("a.parquet", 2, (6, 8)))
        assert record.failure
        assert record.passing is passing


def busy_once(spec, folder):
    if not (mark := Path(folder) / "busy").exists():
        mark.touch()
        raise OSError("503 Slow Down")
    return numbers(spec, None)


def test_a_fan_out_waits_for_a_storage_to_recover(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("evatok.distributed.schedule.PAUSES", (0.2,))
    (tmp_path / "marks").mkdir()
    target, state = Location.parse(tmp_path / "out"), functools.partial(str, tmp_path / "marks")
    assert fan_out(plan(1), busy_once, target, key="k", state=state, retries=1).retries == 1


def refused(spec, state):
    raise UserError("no assignment fits a budget of 3")


def impossible():
    raise UserError("the weights are not here")


def test_a_mistake_of_the_user_ends_it_at_once_as_such(ray_cluster, tmp_path):
    place = Location.parse(tmp_path)
    with pytest.raises(UserError, match="a budget of 3"):
        fan_out(plan(), refused, place, key="k")
    with pytest.raises(UserError, match="weights"):
        fan_out(plan(), numbers, place, key="k", state=impossible)
    assert fan_out(plan(), numbers, place, key="k").rows == 24


class FullDisk(Location):
    def write_bytes(self, name, data):
        if name > "0007":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        super().write_bytes(name, data)


def test_a_full_disk_stops_at_once_and_says_what_to_do(ray_cluster, tmp_path):
    place = Location.parse(tmp_path)
    with pytest.raises(FanOutError, match=r"full(.|\n)*No space left(.|\n)*Free some space"):
        fan_out(plan(), numbers, FullDisk(place.fs, place.path, place.uri), key="k")
    assert fan_out(plan(), numbers, place, key="k").rows == 24


def slow_once(spec, folder):
    if spec[0] == 2 and not (mark := Path(folder) / "slow").exists():
        mark.touch()
        time.sleep(120)
    return numbers(spec, None)


def test_a_straggler_is_overtaken_by_a_copy(ray_cluster, tmp_path):
    (tmp_path / "marks").mkdir()
    target = Location.parse(tmp_path / "out")
    summary = fan_out(plan(), slow_once, target, key="k", state=functools.partial(str, tmp_path / "marks"))
    assert summary.copies == 1
    assert summary.seconds < 60
    assert sorted(pq.read_table(tmp_path / "out")["n"].to_pylist()) == list(range(24))
