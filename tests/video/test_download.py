"""Downloads from a server that misbehaves in every way we met."""

from __future__ import annotations

import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from evatok.artifacts import Location
from evatok.errors import UserError
from evatok.video.decode import DecodeError, MediaLimits
from evatok.video.download import Download, DownloadConfig, download_all, fetch
from evatok.video.sources import WebVidSource

HERE = "127.0.0.1"


class Misbehaving(BaseHTTPRequestHandler):
    """/good is a video. The others are what the name says; most give the video at a later attempt."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        name = self.path.rpartition("/")[2]
        asked = server.asked.setdefault(name, [])
        asked.append(self.headers.get("Range"))
        with server.lock:
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            getattr(self, name.replace("-", "_").partition(".")[0], self.good)(len(asked))
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.busy -= 1

    def log_message(self, *_) -> None:
        pass

    def answer(self, status, body=b"", kind="video/mp4", promised=None, **headers) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if promised is not False:
            self.send_header("Content-Length", str(len(body) if promised is None else promised))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def good(self, attempt) -> None:
        time.sleep(self.server.delay)
        self.answer(200, self.server.video)

    def truncated(self, attempt) -> None:
        """Breaks off at a third and continues when it is asked to."""
        video, asked = self.server.video, self.headers.get("Range")
        first = int(asked[6:-1]) if asked else 0
        rest, share = video[first:], len(video) // 3 + 1
        tag = {"ETag": '"one"', "Content_Range": f"bytes {first}-{len(video) - 1}/{len(video)}"}
        if self.headers.get("If-Range") not in (None, '"one"'):
            first, rest = 0, video
        self.answer(206 if first else 200, rest[:share], promised=len(rest), **tag)
        self.close_connection = True

    def restarts(self, attempt) -> None:
        """Breaks off once and does not know ranges."""
        video = self.server.video
        self.answer(200, video[: len(video) // 2] if attempt == 1 else video, promised=len(video))
        self.close_connection = True

    def overlapping(self, attempt) -> None:
        """Says that what we have is no part of the file."""
        if self.headers.get("Range"):
            self.answer(416)
        else:
            self.good(attempt)

    def busy(self, attempt) -> None:
        if attempt == 1:
            self.answer(429, Retry_After="1")
        elif attempt == 2:
            self.answer(503)
        else:
            self.good(attempt)

    def gone(self, attempt) -> None:
        self.answer(404)

    def forbidden(self, attempt) -> None:
        self.answer(403, self.server.video, kind="video/mp4")

    def page(self, attempt) -> None:
        self.answer(200, b"<html>please log in</html>", kind="text/html")

    def disguised(self, attempt) -> None:
        self.answer(200, b"<html>please log in</html>" * 99, kind="video/mp4")

    def huge(self, attempt) -> None:
        self.answer(200, b"", promised=10**12)
        self.close_connection = True

    def endless(self, attempt) -> None:
        self.answer(200, promised=False)
        self.close_connection = True
        for _ in range(10_000):
            self.wfile.write(b"\0" * 4096)

    def slow(self, attempt) -> None:
        self.answer(200, promised=10**6)
        for _ in range(100):
            self.wfile.write(b"\0")
            self.wfile.flush()
            time.sleep(0.1)

    def dribble(self, attempt) -> None:
        """A header without end."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
        for self.server.dribbled in range(100):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def odd_length(self, attempt) -> None:
        self.answer(200, promised="12abc")
        self.close_connection = True

    def held(self, attempt) -> None:
        """Not before many others were asked for."""
        for _ in range(500):
            if len(self.server.asked) > 30:
                return self.good(attempt)
            time.sleep(0.02)
        self.answer(404)

    def to_good(self, attempt) -> None:
        self.answer(302, Location="/clips/good")

    def to_private(self, attempt) -> None:
        self.answer(302, Location="http://10.1.2.3/secret")

    def to_localhost(self, attempt) -> None:
        self.answer(302, Location=f"http://localhost:{self.server.server_port}/good")

    def to_file(self, attempt) -> None:
        self.answer(302, Location="file:///etc/passwd")

    def in_circles(self, attempt) -> None:
        self.answer(302, Location="/in-circles")


@pytest.fixture
def server(tmp_path, write, moving):
    with ThreadingHTTPServer((HERE, 0), Misbehaving) as running:
        running.video = write(tmp_path / "served.mp4", moving(20)).read_bytes()
        running.asked, running.lock, running.busy, running.busiest = {}, threading.Lock(), 0, 0
        running.delay, running.dribbled = 0.0, 0
        running.url = f"http://{HERE}:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def settings(**changes) -> DownloadConfig:
    return DownloadConfig(**({"hosts": (HERE,), "seconds": 20, "attempts": 4} | changes))


def get(server, tmp_path, name, **changes):
    path = tmp_path / "into" / f"{name}.mp4"
    fetch(Download(f"{server.url}/{name}", path), settings(**changes))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return path


@pytest.mark.parametrize("name", ["good", "truncated", "restarts", "overlapping", "busy", "to-good"])
def test_what_can_be_had_arrives_whole(server, tmp_path, name):
    if name == "overlapping":
        (tmp_path / "into").mkdir()
        (tmp_path / "into" / "overlapping.mp4.part").write_bytes(b"x" * 10**5)
    assert get(server, tmp_path, name).read_bytes() == server.video


def test_a_file_cut_off_is_continued_where_it_broke_off(server, tmp_path):
    get(server, tmp_path, "truncated")
    third = len(server.video) // 3 + 1
    assert server.asked["truncated"] == [None, f"bytes={third}-", f"bytes={2 * third}-"]


def test_a_part_left_by_an_earlier_run_is_continued(server, tmp_path):
    with pytest.raises(DecodeError):
        get(server, tmp_path, "truncated", attempts=1)
    assert (tmp_path / "into" / "truncated.mp4.part").exists()
    get(server, tmp_path, "truncated")
    assert None not in server.asked["truncated"][1:]


def test_a_busy_server_is_given_the_time_it_asks_for(server, tmp_path):
    started = time.monotonic()
    get(server, tmp_path, "busy")
    assert time.monotonic() - started >= 1
    assert len(server.asked["busy"]) == 3


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("gone", "http", "404"),
        ("forbidden", "http", "403"),
        ("page", "http", "text/html"),
        ("disguised", "unreadable", "disguised"),
        ("huge", "too_large", "1000000000000"),
        ("endless", "too_large", "more than"),
        ("slow", "timeout", "not done"),
        ("dribble", "timeout", "not done"),
        ("odd-length", "http", "12abc"),
        ("to-private", "outside", "10.1.2.3"),
        ("to-localhost", "outside", "localhost"),
        ("to-file", "outside", "file:"),
        ("in-circles", "http", "redirects"),
    ],
)
def test_what_cannot_be_had_says_why_and_leaves_no_file(server, tmp_path, name, code, says):
    with pytest.raises(DecodeError, match=says) as raised:
        get(server, tmp_path, name, bytes=10**6, seconds=1.5)
    assert raised.value.code == code
    assert not (tmp_path / "into" / f"{name}.mp4").exists()
    assert len(server.asked[name]) <= 7
    assert server.dribbled < 99


def test_a_name_that_points_to_a_private_address_is_refused(server, tmp_path):
    url = f"http://localhost:{server.server_port}/good"
    with pytest.raises(DecodeError, match="no public address"):
        fetch(Download(url, tmp_path / "a.mp4"), settings(hosts=("localhost",)))
    assert not server.asked


def test_many_files_come_in_order_and_never_too_many_at_once(server, tmp_path):
    server.delay = 0.02
    names = [f"good.{k}" if k % 5 else f"gone.{k}" for k in range(30)]
    items = [(name, Download(f"{server.url}/{name}", tmp_path / name)) for name in names]
    items.insert(7, ("local", None))
    results = list(download_all(items, settings(concurrency=3), MediaLimits()))
    assert [name for name, _ in results] == [name for name, _ in items]
    assert [name for name, error in results if error] == [name for name in names if name.startswith("gone")]
    assert server.busiest <= 3
    again = list(download_all(items[:3], settings(), MediaLimits()))
    assert len(server.asked["good.1"]) == 1
    assert again[1] == ("good.1", None)


def test_one_file_that_takes_long_holds_up_no_other(server, tmp_path):
    names = ["held", *(f"good.{k}" for k in range(40))]
    items = [(name, Download(f"{server.url}/{name}", tmp_path / name)) for name in names]
    results = list(download_all(items, settings(concurrency=2), MediaLimits()))
    assert results == [(name, None) for name in names]


def test_a_disk_that_is_full_ends_it_and_a_name_that_no_file_can_have_does_not(server, tmp_path):
    long, full = (Download(f"{server.url}/good", tmp_path / name) for name in ("x" * 252, "a.mp4"))
    ((_, error),) = download_all([(0, long)], settings(), MediaLimits())
    assert error.code == "outside"
    (tmp_path / "a.mp4.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"a\.mp4: .*No space left(.|\n)*the same command"):
        list(download_all([(0, full)], settings(), MediaLimits()))


def test_a_network_that_is_out_rejects_no_row(server, tmp_path, monkeypatch):
    monkeypatch.setattr("evatok.video.download._SILENT", 3)
    closed = server.url.rpartition(":")[0] + ":9"
    urls = [f"{server.url}/good", *[f"{closed}/{k}" for k in range(3)], f"{server.url}/good.2"]
    items = [(k, Download(url, tmp_path / f"{k}.mp4")) for k, url in enumerate(urls)]
    with pytest.raises(UserError, match=r"No server answered for 3 files(.|\n)*the same command"):
        list(download_all(items, settings(concurrency=1, attempts=1), MediaLimits()))
    assert (tmp_path / "0.mp4").exists()
    mended = [(k, Download(f"{server.url}/good", item.path)) for k, item in items]
    assert list(download_all(mended, settings(), MediaLimits())) == [(k, None) for k in range(5)]


def test_webvid_rows_are_downloaded_into_place(server, tmp_path):
    root = tmp_path / "webvid"
    root.mkdir()
    lines = ["videoid,name,page_dir,contentUrl"]
    lines += [
        f"1,first,000_100,{server.url}/good",
        f"2,second,,{server.url}/gone",
        f"../3,evil,,{server.url}/good",
    ]
    (root / "list.csv").write_text("\n".join(lines))
    source = WebVidSource(path=str(root), csv=str(root / "list.csv"), download=True, fetch=settings())
    videos = list(source.videos(Location.parse(tmp_path)))
    assert [video.problem and video.problem[0] for video in videos] == [None, "http", "outside"]
    assert (root / "videos" / "000_100" / "1.mp4").read_bytes() == server.video
    (root / "videos" / "000_100" / "1.mp4").unlink()
    (limited, *_) = source.videos(Location.parse(tmp_path), MediaLimits(frames=5))
    assert limited.problem[0] == "too_long"
    closed = source.model_copy(update={"fetch": settings(hosts=())})
    with pytest.raises(UserError, match="hosts"):
        list(closed.videos(Location.parse(tmp_path)))


def test_addresses_that_are_none_reject_their_row_alone(server, tmp_path):
    addresses = [
        "http://[x",
        f"http://{'a' * 300}.example/1",
        f"{server.url.rpartition(':')[0]}:99999/good",
        f"{server.url}/gööd",
        "http://example:port/1",
        f"{server.url}/good",
    ]
    items = [(k, Download(url, tmp_path / f"{k}.mp4")) for k, url in enumerate(addresses)]
    hosts = ("127.0.0.1", "*.example", "example")
    results = [error for _, error in download_all(items, settings(hosts=hosts), MediaLimits())]
    assert [error and error.code for error in results] == ["outside"] * 5 + [None]
    assert all(address in error.detail for address, error in zip(addresses[:5], results))


def test_what_was_downloaded_is_looked_into_by_a_process_that_may_die(server, tmp_path, monkeypatch):
    monkeypatch.setattr("evatok.video.download.probe", _die)
    ((_, error),) = download_all(
        [(0, Download(f"{server.url}/good", tmp_path / "a.mp4"))], settings(), MediaLimits()
    )
    assert error.code == "crash"
    assert not list(tmp_path.glob("a.mp4*"))


def _die(path, limits):
    os.kill(os.getpid(), signal.SIGSEGV)
