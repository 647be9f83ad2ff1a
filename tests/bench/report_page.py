"""The report of a long and troubled run: seconds to build it, its bytes, and how smoothly a browser scrolls it.

    python tests/bench/report_page.py --out report_page.json

A run folder with a million steps and 500 incidents is made up (tests/report/histories.py), `python -m
orchestrator.report` builds its page, a Chromium without a window opens it and scrolls it from top to bottom, some
pixels in every frame; a frame's time is from one requestAnimationFrame to the next. Targets: 10 s, 8 MB.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import commands
import paired

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does, by pyproject.toml

from report.histories import write_run

BUILD_S, PAGE_BYTES = paired.Target(10.0, at_least=False), paired.Target(8e6, at_least=False)
WINDOW = {"width": 1280, "height": 900}
PIXELS = 40  # a frame: a quick turn of the wheel
SCROLL = """(pixels) => new Promise((done) => {
  const frames = []; let before = null;
  const step = (now) => {
    if (before !== null) frames.push(now - before);
    before = now;
    const root = document.documentElement;
    if (root.scrollTop + innerHeight >= root.scrollHeight - 1) { done(frames); return; }
    scrollBy(0, pixels);
    requestAnimationFrame(step);
  };
  scrollTo(0, 0);
  requestAnimationFrame(step);
})"""
DRAWN = "[...document.querySelectorAll('.chart')].every((chart) => chart.querySelector('svg.main-svg'))"


def scroll(page: Path, visits: int) -> dict[str, Any]:
    """Milliseconds until all charts are drawn, and those of the frames of each visit."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    drawn, frames = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(visits):
            tab = browser.new_context(offline=True, viewport=WINDOW).new_page()
            started = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_function(DRAWN)
            drawn.append((time.perf_counter() - started) * 1000)
            frames.append(tab.evaluate(SCROLL, PIXELS))
            height = tab.evaluate("document.documentElement.scrollHeight")
            tab.context.close()
        version = browser.version
        browser.close()
    return {
        "chromium": version,
        "page_height_px": height,
        "drawn_ms": round(statistics.median(drawn), 1),
        "frames": [len(visit) for visit in frames],
        **{name: round(statistics.median(map(of, frames)), 2) for name, of in FRAME_MS.items()},
    }


FRAME_MS = {
    "frame_ms_median": statistics.median,
    "frame_ms_95th": lambda visit: statistics.quantiles(visit, n=20)[-1],
    "frame_ms_longest": max,
}


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=3)
    parser.add_argument("--steps", type=int, default=1_000_000, help="[1000000]")
    parser.add_argument("--incidents", type=int, default=500, help="[500]")
    settings = parser.parse_args()
    report = paired.header("report_page", settings)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        run = write_run(folder / "long", settings.steps, settings.incidents, shards=64, step_s=0.05).folder
        page, seconds, cpu = folder / "report.html", [], []
        for _ in range(settings.visits):
            started, before = time.perf_counter(), os.times()
            commands.run(["-m", "orchestrator.report", str(run), "--out", str(page)], folder)
            after = os.times()
            seconds.append(time.perf_counter() - started)
            cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
        build_s, size = statistics.median(seconds), page.stat().st_size
        report["build"] = {
            "seconds": [round(s, 2) for s in seconds],
            "cpu_seconds": [round(s, 2) for s in cpu],
            "target": str(BUILD_S),
            "met": BUILD_S.met(build_s),
        }
        report["page"] = {"bytes": size, "target": str(PAGE_BYTES), "met": PAGE_BYTES.met(size)}
        report["scrolling"] = scroll(page, settings.visits)
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
