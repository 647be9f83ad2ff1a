"""The page as a person opens it: in a browser, from a file, on a phone, in the dark, by keyboard, on paper."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.histories import FAILURE, SHA256, write_run

from orchestrator import report
from orchestrator.history import ALIVE_S, read_history, thin, training_shares

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here; apt-get install chromium")
SPOKEN_KINDS = ("worker killed", "node lost", "node drained")
PHONE, DESK = {"width": 390, "height": 800}, {"width": 1280, "height": 900}


def build(folder: Path, *more: str) -> Path:
    out = folder.parent / "report.html"
    assert report.main([str(folder), "--out", str(out), *more]) == 0
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, page: Path, **settings: Any) -> Any:
    """The page in a new window without a network; any error of its scripts fails the test."""
    context = browser.new_context(offline=True, viewport=settings.pop("viewport", DESK), **settings)
    tab = context.new_page()
    tab.on("pageerror", lambda error: pytest.fail(f"the page's script: {error}"))
    tab.on("request", lambda request: request.url.startswith("file:") or pytest.fail(f"asks for {request.url}"))
    tab.goto(page.as_uri())
    return tab


@needs_browser
def test_a_finished_run_in_a_browser(browser, tmp_path):
    written = write_run(tmp_path / "night")
    tab = opened(browser, build(written.folder))
    assert tab.title() == "night: finished"
    assert tab.locator("h1").inner_text() == "night"
    assert SHA256 in tab.locator(".hash").inner_text()
    titles = ["Training", "Workers", "Incidents", "Where the time goes", "Plan and configuration"]
    assert tab.locator("h2").all_inner_texts() == titles
    charts = tab.locator(".chart")
    assert charts.count() == 7
    for i in range(charts.count()):
        assert charts.nth(i).locator("svg.main-svg").count(), "a chart was not drawn"
    marks = tab.locator("#loss .scatterlayer path.point")
    assert marks.count() == len(written.incidents)
    rows = tab.locator("section[aria-labelledby=incidents] tbody tr")
    assert rows.count() == 3
    assert [int(rows.nth(i).locator("td").nth(1).inner_text()) for i in range(3)] == written.incidents
    assert "rank 1 <process 7>" in rows.nth(0).inner_text(), "what is known of an incident is shown as it is"
    assert "digits & <b>numbers</b>" in tab.locator("section[aria-labelledby=plan-and-configuration]").inner_text()
    assert 'workload = "resnet"' in tab.locator("pre").inner_text()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_leaves_the_screen(browser, tmp_path, scheme):
    tab = opened(browser, build(write_run(tmp_path / "night").folder), viewport=PHONE, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    back, text = tab.evaluate(
        "[getComputedStyle(document.body).backgroundColor, "
        "getComputedStyle(document.querySelector('#loss .xtitle')).fill]"
    )
    assert contrast(back, text) >= 4.5, "WCAG 2.1, 1.4.3"


def contrast(one: str, other: str) -> float:
    """The contrast of two CSS colours, as WCAG 2.1 defines it."""

    def luminance(css: str) -> float:
        channels = np.array([float(c) for c in css[css.index("(") + 1 : -1].split(",")[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@needs_browser
def test_by_keyboard_and_on_paper(browser, tmp_path):
    tab = opened(browser, build(write_run(tmp_path / "night").folder), color_scheme="dark")
    reached = []
    for _ in range(80):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.innerText || ''"))
        if reached[-1].startswith("Generations"):
            tab.keyboard.press("Enter")
            break
    assert "Incidents" in reached, "the links to the sections come first"
    assert tab.evaluate("document.activeElement.parentElement.open")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.locator("nav").is_visible()


def heard(tab: Any) -> list[dict[str, Any]]:
    """What Chromium tells a screen reader, in order: role, name, whether the keyboard gets there."""
    found = tab.context.new_cdp_session(tab).send("Accessibility.getFullAXTree")["nodes"]
    return [
        {
            "role": node["role"]["value"],
            "name": node.get("name", {}).get("value", "").strip(),
            "focusable": any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", [])),
        }
        for node in found
        if not node["ignored"]
    ]


@needs_browser
def test_as_a_screen_reader_has_it(browser, tmp_path):
    """Curves in numbers with their incidents, nothing drawn, and a name for all that can be reached."""
    written = write_run(tmp_path / "night", status="failed")  # the page with the most on it
    write_run(tmp_path / "other", incidents=0)
    tab = opened(browser, build(written.folder, "--compare", str(tmp_path / "other")))
    nodes = heard(tab)
    assert not [node for node in nodes if node["focusable"] and not node["name"]]
    buttons = [node["name"] for node in nodes if node["role"] == "button"]
    assert buttons == ["Zoom", "Pan", "Reset axes", "Download plot as a PNG"] * 7
    assert not {node["role"] for node in nodes} & {"image", "SvgRoot", "graphics-document"}, "a drawing is read out"
    figures = [node["name"] for node in nodes if node["role"] == "figure"]
    assert len(figures) == 7
    assert all(len(name) > 20 for name in figures)
    toolbars = [node["name"] for node in nodes if node["role"] == "toolbar"]
    assert toolbars == figures
    said = [node["name"] for node in nodes if node["role"] == "StaticText"]
    losses = [json.loads(line)["loss"] for line in (written.folder / "metrics.jsonl").read_text().splitlines()]
    least, most = int(np.argmin(losses)), int(np.argmax(losses))
    (of_loss,) = [text for text in said if text.startswith(f"night: first {losses[0]:.5g} at step 1, ")]
    assert f"last {losses[-1]:.5g} at step 200" in of_loss
    assert f"least {losses[least]:.5g} at step {least + 1}, greatest {losses[most]:.5g} at step {most + 1}." in of_loss
    assert " other: first " in of_loss
    marked = ", ".join(f"{kind} at step {step}" for kind, step in zip(SPOKEN_KINDS, written.incidents, strict=True))
    assert of_loss.endswith(f"Incidents marked: {marked}.")
    assert any("last 0.9 at step 200" in text for text in said), "held-out accuracy"
    assert any(text.startswith("Workers: 4 from 2026-05-28 20:26:41 UTC, step 0; 3 from ") for text in said)
    assert any("4 workers with 2 to 2 shards each." in text for text in said)
    assert any(text.startswith("data: first 0.05 at step 1, last 0.05 at step 200") for text in said)


@needs_browser
def test_runs_side_by_side(browser, tmp_path):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", incidents=0, lr=0.05)
    tab = opened(browser, build(tmp_path / "one", "--compare", str(tmp_path / "two")))
    compared = tab.locator("section[aria-labelledby=comparison]")
    assert "All ended with the same weights." in compared.inner_text()
    settings = compared.locator("table").nth(1).locator("tbody tr td:first-child").all_inner_texts()
    assert settings == ["lr", "name"]
    assert tab.locator("#loss .legendtext").all_text_contents()[:2] == ["one", "two"]


def test_a_million_steps_and_five_hundred_incidents(tmp_path):
    """Small enough to send; drawn in a browser by the benchmark tests/bench/report_page.py, which times it too."""
    written = write_run(tmp_path / "long", 1_000_000, 500, shards=64, step_s=0.05)
    page = build(written.folder)
    assert page.stat().st_size < 8e6
    assert page.read_text().count("rank 1 &lt;process 7&gt;") == 500


@pytest.mark.parametrize(("age_s", "outcome"), [(0.0, "going on"), (10 * ALIVE_S, "broke off")])
def test_a_run_without_an_end(tmp_path, age_s, outcome):
    write_run(tmp_path / "run", status="", began_s=time.time() - age_s - 100)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "lo')  # being written, or torn
    text = build(tmp_path / "run").read_text()
    assert f"<title>run: {outcome}</title>" in text
    assert "200 of 200" in text


def test_a_run_that_has_not_begun_to_train(tmp_path):
    write_run(tmp_path / "run", steps=0, incidents=0, status="", began_s=time.time())
    (tmp_path / "run" / "events.jsonl").write_text("")
    text = build(tmp_path / "run").read_text()
    assert "No step has been committed yet." in text
    assert "No worker has begun to train yet." in text


def test_a_failed_run_says_why(tmp_path):
    write_run(tmp_path / "run", status="failed")
    text = build(tmp_path / "run").read_text()
    assert "failed: storage does not answer" in text
    for told in (FAILURE.where, FAILURE.kept, FAILURE.resume, "reading part 7\ncurl: &lt;timed out&gt;"):
        assert told in text


def test_a_run_that_failed_before_failures_were_written_down(tmp_path):
    write_run(tmp_path / "run", status="failed")
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    del found["failure"]
    (tmp_path / "run" / "result.json").write_text(json.dumps(found))
    text = build(tmp_path / "run").read_text()
    assert "failed: storage does not answer" in text
    assert "What failed" not in text


@pytest.mark.parametrize("arguments", [["nowhere"], ["{run}", "--out", "/nowhere/page.html"], ["{run}", "--outt", "x"]])
def test_mistakes_are_one_line(tmp_path, capsys, arguments):
    write_run(tmp_path / "run")
    assert report.main([a.format(run=tmp_path / "run") for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_markup_in_a_name_is_text(tmp_path):
    write_run(tmp_path / "run")
    config = (tmp_path / "run" / "config.toml").read_text().replace('name = "run"', 'name = "</script><i>x"')
    (tmp_path / "run" / "config.toml").write_text(config)
    text = build(tmp_path / "run").read_text()
    assert "</script><i>" not in text


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=300), st.integers(1, 50))
def test_a_thinned_curve_keeps_mean_and_extremes(values, points):
    y = np.array(values, float)
    curve = thin(np.arange(len(y), dtype=float), y, points)
    known = y[np.isfinite(y)]
    assert len(curve.x) <= max(points, 0) or len(known) <= points
    if len(known):
        assert curve.low.min() == known.min()
        assert curve.high.max() == known.max()
        assert (curve.low <= curve.mean + 1e-6).all()
        assert (np.diff(curve.x) > 0).all()


def test_shares_add_up(tmp_path):
    shares = training_shares(read_history(str(write_run(tmp_path / "run").folder)))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["forward and backward"] == pytest.approx(0.7, rel=0.01)
    assert shares["optimizer and the rest"] == pytest.approx(0.1, rel=0.02)


def test_old_runs_without_shares_can_be_read(tmp_path):
    write_run(tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [{k: v for k, v in r.items() if not k.endswith("_share")} for r in records]
    file.write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert "Parts of a step" in build(tmp_path / "run").read_text()
