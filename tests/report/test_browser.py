"""The page in a real browser; skipped where no Chromium is installed."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from evatok.report.page import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
]
WATCH = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message ?? event.target.src), true);
console.error = (...all) => errors.push(all.join(" "));
</script>"""
MEASURE = """<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => setTimeout(() => {
  const page = frame.contentDocument;
  const videos = [...page.querySelectorAll("video")];
  document.querySelector("pre").textContent = JSON.stringify({
    beyond: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    errors: frame.contentWindow.eval("errors"),
    videos: videos.length,
    missing: videos.filter((video) => video.error || !video.videoWidth).length,
    charts: [...page.querySelectorAll("svg.plot")].filter((chart) => chart.clientWidth > 0).length,
    clipped: [...page.querySelectorAll("h1, h2, h3, .tiles strong, .tiles .note, button")]
      .filter((text) => text.scrollWidth > text.clientWidth + 1).length,
  });
}, 2500));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.parametrize("width", [1400, 420])
def test_the_page_fits_its_window_and_everything_in_it_loads(fabricated_run, tmp_path, width):
    page = render(fabricated_run).replace("<head>", f"<head>{WATCH}", 1)
    frame = f'<iframe srcdoc="{escape(page)}" style="width:{width}px;height:4000px;border:0"></iframe>'
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8><pre></pre>{frame}{MEASURE}")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,4000"]
    command += ["--virtual-time-budget=8000", "--dump-dom", wrapper.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
    found = json.loads(unescape(re.search(r"<pre>(.*?)</pre>", shown, re.S).group(1)))
    assert found["beyond"] == 0
    assert found["errors"] == []
    assert found["videos"] == 15
    assert found["missing"] == 0
    assert found["charts"] > 30
    assert found["clipped"] == 0
