import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from evatok.artifacts import Location
from evatok.report.page import duration, render, write_report

VOID = {"meta", "link", "br", "input", "img"}


class _Balance(HTMLParser):
    """Collects the tags that are not closed in order, and every address that leaves the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href") and not value.startswith(("data:", "#")):
                self.outside.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page: str) -> _Balance:
    checked = _Balance()
    checked.feed(page)
    assert checked.open == []
    return checked


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', page)


def test_a_finished_run_shows_every_section_and_nothing_from_outside(fabricated_run):
    page = render(fabricated_run)
    checked = parse(page)
    assert sections(page) == [
        "quality",
        "strips",
        "tokens",
        "router",
        "training",
        "data",
        "reward",
        "provenance",
    ]
    assert checked.outside == []
    assert len(checked.ids) == len(set(checked.ids))
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


@pytest.mark.parametrize("stages", range(6))
def test_an_unfinished_run_shows_what_is_done(fabricate, tmp_path, stages):
    page = render(fabricate(Location.parse(tmp_path / "run"), stages))
    parse(page)
    assert page.count('<li class="done">') == stages
    assert page.count('<li class="missing">') == 6 - stages
    assert ("training" in sections(page)) == (stages >= 2)
    assert "quality" not in sections(page)


def test_generated_samples_are_shown_with_the_lengths_they_chose(fabricated_run, add_generated):
    add_generated(fabricated_run)
    page = render(fabricated_run)
    assert parse(page).outside == []
    assert sections(page)[:3] == ["quality", "strips", "generated"]
    assert "Archery" in page
    assert "tokens by block: 64, 16, 16, 8" in page


def test_an_empty_folder_gives_a_page_too(tmp_path):
    parse(render(Location.parse(tmp_path)))


def test_the_page_counts_what_the_index_rejected_by_reason(fabricated_run):
    page = render(fabricated_run)
    assert "4 rejected" in page
    assert re.search(r"unreadable</th><td>3<", page)


def test_the_router_section_shows_its_held_out_measures(fabricated_run):
    assert re.search(r"<dt>top1</dt><dd>0.117</dd>", render(fabricated_run))


def test_where_the_time_went_is_one_panel_with_what_is_left_over(fabricated_run):
    page = render(fabricated_run)
    assert page.count("time of a step: backward 45 %, forward 40 %, data 10 %, other 5 %") == 3
    assert "time forward" not in page


def test_the_page_shows_the_experiment_as_it_was_run_and_escapes_it(fabricated_run):
    fabricated_run.write_bytes("experiment.yaml", b"name: '<script>alert(1)</script>'\n")
    page = render(fabricated_run)
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_clip_with_a_hostile_name_cannot_break_out(fabricated_run):
    samples = (fabricated_run / "evaluate").read_json("samples.json")
    samples["clips"][0]["clip_id"] = '"><img src=x onerror=alert(1)>'
    (fabricated_run / "evaluate").write_json("samples.json", samples)
    assert "<img" not in render(fabricated_run)


def test_every_policy_has_its_curve_at_both_widths(fabricated_run):
    page = render(fabricated_run)
    policies = (fabricated_run / "evaluate").read_json("policies.json")["policies"]
    view = page[page.index('id="view-1"') : page.index('id="view-2"')]
    wide, narrow = view.split('class="narrow"')
    for policy in policies:
        assert f'data-policy="{policy}"' in wide
        assert f'data-policy="{policy}"' in narrow


def test_the_report_is_one_file_in_the_runs_folder(fabricated_run):
    assert write_report(fabricated_run) == f"{fabricated_run.uri}/report.html"
    assert fabricated_run.read_bytes("report.html").startswith(b"<!doctype html>")


def test_drawing_a_report_needs_neither_torch_nor_ray():
    code = "import sys, evatok.report.page; print([m for m in ('torch', 'ray', 'av') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "\u2013"),
        (4.04, "4.0 s"),
        (59, "59 s"),
        (200, "3 min 20 s"),
        (18120, "5 h 02 min"),
        (273600, "3 d 04 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_the_tile_shows_what_the_router_saves_where_it_is_quoted_and_not_along_its_curve(fabricated_run):
    page = render(fabricated_run)
    tile = re.search(r"tokens saved against static</span><strong>(.*?)</strong>.*?equal DSSIM", page)
    assert tile
    assert tile[1] == "4 %"
    assert re.search(r"with [\d.]+ tokens; best uniform \(\d+, [\d.]+ tokens\)", page)
