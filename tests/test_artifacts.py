"""Run folders: safe names, files that appear whole, curves across resumes, one driver at a time."""

import os
import pickle
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pytest

from evatok.artifacts import (
    CurveWriter,
    Location,
    Manifest,
    exclusive,
    fingerprint,
    publish,
    read_curves,
    read_manifest,
)
from evatok.errors import UserError


@pytest.fixture(params=["local", "remote"])
def location(request, tmp_path: Path) -> Location:
    """A folder on disk, and one on a file system that pyarrow reaches through fsspec."""
    if request.param == "local":
        return Location.parse(tmp_path / "run")
    return Location.parse(f"memory://{uuid.uuid4().hex}/run")


def test_what_is_written_is_read_back(location: Location):
    assert not location.exists()
    assert location.list() == []
    location.write_json("stage/a.json", {"x": [1, 2]})
    location.write_table("stage/t.parquet", pa.table({"n": [1, 2], "m": [3, 4]}))
    assert location.read_json("stage/a.json") == {"x": [1, 2]}
    assert location.read_table("stage/t.parquet", columns=["m"]).to_pydict() == {"m": [3, 4]}
    assert (location / "stage").list() == ["a.json", "t.parquet"]
    location.delete("stage/a.json")
    location.delete("stage/a.json")
    assert location.list("stage") == ["t.parquet"]
    location.delete("stage")
    assert not location.exists("stage")


def test_missing_file_raises_file_not_found(location: Location):
    with pytest.raises(FileNotFoundError):
        location.read_bytes("nothing")
    with pytest.raises(FileNotFoundError):
        location.download("nothing", "unused")


def test_upload_replaces_the_whole_folder(location: Location, tmp_path: Path):
    for text in ("one", "two"):
        source = tmp_path / text
        (source / "deep").mkdir(parents=True)
        (source / "deep" / f"{text}.txt").write_text(text)
        location.upload(source, "model")
    copy = location.download("model", tmp_path / "copy")
    assert [p.relative_to(copy).as_posix() for p in copy.rglob("*.txt")] == ["deep/two.txt"]
    single = location.download("model/deep/two.txt", tmp_path / "single")
    assert single.read_text() == "two"


@pytest.mark.parametrize("name", ["..", "a/../b", "/etc/passwd", "a//b", "", "a\\b", "./a"])
def test_name_cannot_leave_the_folder(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="not a name"):
        _ = Location.parse(tmp_path) / name
    with pytest.raises(ValueError, match="not a name"):
        Location.parse(tmp_path).write_bytes(name, b"")


def test_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch):
    location = Location.parse(tmp_path)
    location.write_bytes("a", b"first")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        location.write_bytes("a", b"second")
    assert location.read_bytes("a") == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_location_travels_to_other_processes(tmp_path: Path):
    location = Location.parse(tmp_path) / "x"
    copy = pickle.loads(pickle.dumps(location))  # noqa: S301
    copy.write_bytes("a", b"1")
    assert location.read_bytes("a") == b"1"
    assert location.local() == tmp_path / "x"
    assert Location.parse("memory://x").local() is None


def test_address_without_a_file_system_is_the_users_mistake():
    with pytest.raises(UserError, match="nosuch://x"):
        Location.parse("nosuch://x/y")


def _row(step: int, value: float, split: str = "train") -> dict:
    return {"step": step, "samples": step * 8, "time": 0.0, "split": split, "loss": value}


def test_steps_run_again_after_a_resume_replace_the_earlier_ones(location: Location):
    first = CurveWriter(location)
    for step in range(1, 7):
        first.write(_row(step, 0.0))
        if step % 2 == 0:
            first.write(_row(step, 0.0, "eval"))
            first.flush()
    first.flush()
    second = CurveWriter(location)
    second.write(_row(4, 1.0))
    second.write(_row(4, 1.0, "eval"))
    second.flush()
    rows = [(row["step"], row["split"], row["loss"]) for row in read_curves(location)]
    assert sorted(rows) == [
        (1, "train", 0.0),
        (2, "eval", 0.0),
        (2, "train", 0.0),
        (3, "train", 0.0),
        (4, "eval", 1.0),
        (4, "train", 1.0),
    ]


def test_two_flushes_within_a_step_keep_both_rows(location: Location):
    writer = CurveWriter(location)
    writer.write(_row(1, 0.5))
    writer.flush()
    writer.write(_row(1, 0.7, "eval"))
    writer.flush()
    assert [row["loss"] for row in read_curves(location)] == [0.5, 0.7]


def test_manifest_says_done_only_once_published_as_done(location: Location):
    started = Manifest(
        stage="proxy",
        state="started",
        config={"proxy": {"lr": 1}},
        fingerprint="f",
        inputs={"index": "g"},
        versions={},
        seed=3,
        started="2026-01-01T00:00:00Z",
    )
    assert read_manifest(location) is None
    publish(location, started)
    assert read_manifest(location) == started
    publish(location, done := started.model_copy(update={"state": "done", "metrics": {"psnr": 20.5}}))
    assert read_manifest(location) == done


def test_broken_manifest_is_named(location: Location):
    location.write_bytes("manifest.json", b"{")
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(location)


def test_fingerprint_depends_on_everything_that_decides_the_result():
    base = fingerprint({"a": 1}, {"index": "x"}, 1, 0)
    assert base == fingerprint({"a": 1}, {"index": "x"}, 1, 0)
    others = [({"a": 2}, {"index": "x"}, 1, 0), ({"a": 1}, {"index": "y"}, 1, 0)]
    others += [({"a": 1}, {"index": "x"}, 2, 0), ({"a": 1}, {"index": "x"}, 1, 1)]
    assert len({base, *(fingerprint(*other) for other in others)}) == 5


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr("evatok.artifacts.LEASE_SECONDS", 0.8)


def test_second_driver_is_refused_and_the_first_is_named(location: Location, short_lease):
    with (
        exclusive(location),
        pytest.raises(UserError, match="in use by process"),
        exclusive(location),
    ):
        pass
    with exclusive(location):
        pass


def test_second_driver_with_patience_waits_for_the_first(location: Location, short_lease):
    with exclusive(location):
        code = (
            "import sys; from evatok.artifacts import *\n"
            "print('waiting', flush=True)\n"
            "with exclusive(Location.parse(sys.argv[1]), patience=60): print('got it')"
        )
        if location.local() is None:
            pytest.skip("another process cannot see this file system")
        second = subprocess.Popen(
            [sys.executable, "-c", code, location.uri], stdout=subprocess.PIPE, text=True
        )
        assert second.stdout.readline() == "waiting\n"
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.5)
    assert second.communicate(timeout=60)[0] == "got it\n"


def test_lock_of_a_killed_driver_is_free_at_once(tmp_path: Path):
    code = (
        "import os, sys\nfrom evatok.artifacts import *\n"
        "with exclusive(Location.parse(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert died.returncode == -9
    with exclusive(Location.parse(tmp_path)):
        pass


def test_lease_of_a_dead_driver_lapses(short_lease):
    location = Location.parse(f"memory://{uuid.uuid4().hex}/run")
    until = time.time() + 0.5
    location.write_json("lease.json", {"id": "dead", "holder": "process 1 on gone", "until": until})
    with exclusive(location):
        assert time.time() > until
        assert location.read_json("lease.json")["id"] != "dead"


def test_lease_outlives_a_storage_that_fails_for_a_moment(short_lease, monkeypatch):
    location = Location.parse(f"memory://{uuid.uuid4().hex}/run")
    with exclusive(location):
        first = location.read_json("lease.json")["until"]
        failing = [OSError("503")]
        write = Location.write_json

        def once(self, name, value):
            if failing:
                raise failing.pop()
            write(self, name, value)

        monkeypatch.setattr(Location, "write_json", once)
        time.sleep(0.7)
        assert location.read_json("lease.json")["until"] > first


def test_driver_that_lost_its_lease_stops_and_leaves_the_new_holders(short_lease):
    location = Location.parse(f"memory://{uuid.uuid4().hex}/run")
    other = {"id": "other", "holder": "process 1 on other", "until": time.time() + 60}

    def work() -> None:
        with exclusive(location):
            location.write_json("lease.json", other)
            time.sleep(5)

    with pytest.raises(UserError, match="lost its hold"):
        work()
    assert location.read_json("lease.json") == other


def test_waiting_for_a_run_keeps_no_files_open(tmp_path: Path, short_lease):
    location = Location.parse(tmp_path)
    with exclusive(location):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(UserError), exclusive(location, patience=0.5):
            pass
        assert len(os.listdir("/proc/self/fd")) == before


def test_addresses_keep_their_options_and_any_character_of_a_name():
    options = "?region=eu-west-1&endpoint_override=localhost:9"
    root = Location.parse(f"s3://bucket/my%20data/{options}")
    assert (root.path, root.uri) == ("bucket/my data", f"s3://bucket/my%20data{options}")
    for name in ("a b.mp4", "50%.mp4", "what?.mp4", "deep/ü#1.mp4"):
        again = Location.parse(root.address(name))
        assert again.path == f"bucket/my data/{name}"
        assert again.uri.endswith(options)
        assert again.fs is root.fs
        assert (root / name).uri == again.uri
    assert Location.parse("s3://bucket/with space?region=eu-west-1").path == "bucket/with space"
    assert Location.parse(f"s3://bucket{options}").address("a") == f"s3://bucket/a{options}"
    other = Location.parse(f"s3://bucket/a{options}&scheme=http")
    assert other.fs is not root.fs


def test_names_of_local_files_and_of_fsspec_stay_as_they_are(tmp_path):
    for root in (Location.parse(tmp_path), Location.parse("memory://bucket")):
        again = Location.parse(root.address("50% of what?.mp4"))
        assert again.path == f"{root.path}/50% of what?.mp4"
