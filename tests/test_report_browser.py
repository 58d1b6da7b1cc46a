"""The report in a real browser: it draws, complains about nothing, zooms, pans and lets runs be chosen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run

from parablock_rt.report import render

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="needs Debian's chromium and chromium-driver; .ci/run installs them as root",
)

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--force-device-scale-factor=1"),
)
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_report(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the report on these folders, waits until it is drawn, and in the end asserts that nothing complained."""

    def open_it(*folders: Path, width: int = 1280) -> Any:
        page = tmp_path / "report.html"
        page.write_text(render(folders), encoding="utf-8")
        browser.set_window_size(width, 900)
        browser.get(page.as_uri())
        assert browser.execute_script("return document.body.dataset.ready") == "yes", browser.get_log("browser")
        return browser

    browser.get_log("browser")
    yield open_it
    assert browser.get_log("browser") == []


def text_of(browser: Any, selector: str) -> list[str]:
    return list(
        browser.execute_script(f"return [...document.querySelectorAll('{selector}')].map((e) => e.textContent)")
    )


def view(browser: Any) -> tuple[float, float]:
    """What the timeline shows, milliseconds."""
    found = browser.execute_script("return document.querySelector('#timeline canvas').dataset")
    return float(found["from"]), float(found["to"])


def ink(browser: Any) -> int:
    """Pixels of the timeline's canvas that are not empty."""
    return int(
        browser.execute_script(
            "const c = document.querySelector('#timeline canvas');"
            "const colors = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "return colors.filter((value, i) => i % 4 == 3 && value).length"
        )
    )


@pytest.mark.parametrize("width", [1280, 1920])
def test_every_section_is_drawn_and_nothing_sticks_out(open_report: Open, tmp_path: Path, width: int) -> None:
    write_run(tmp_path / "r")
    browser = open_report(tmp_path / "r", width=width)
    assert ink(browser) > 10_000
    for section in ("stages", "activity", "loss", "bytes"):
        drawn = browser.execute_script(f"return document.querySelectorAll('#{section} svg :is(path, rect)').length")
        assert drawn > 1, section
    assert len(text_of(browser, "#clients tbody tr")) == 2
    beyond = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(beyond) == 0
    assert text_of(browser, "#notes li") == []
    assert not browser.find_element("id", "notes-card").is_displayed()


def test_the_headline_shows_the_summary_s_figures(open_report: Open, tmp_path: Path) -> None:
    summary = write_run(tmp_path / "r", overlap_efficiency=0.9643, wall_s=12.345, bytes_up=143_821_600)
    browser = open_report(tmp_path / "r")
    shown = {key: text_of(browser, f".tile[data-key={key}] b") for key in ("overlap_efficiency", "wall_s", "bytes_up")}
    assert shown == {"overlap_efficiency": ["96\N{NO-BREAK SPACE}%"], "wall_s": ["12.35 s"], "bytes_up": ["144 MB"]}
    assert text_of(browser, "tr[data-key=eval_loss_after] td")[1] == f"{summary['eval_loss_after']:.4f}"
    assert text_of(browser, "#verdict p")[0].startswith("96\N{NO-BREAK SPACE}% of the communication was hidden")


def test_buttons_keys_wheel_and_dragging_zoom_and_pan(open_report: Open, tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    browser = open_report(tmp_path / "r")
    whole = view(browser)
    canvas = browser.find_element("css selector", "#timeline canvas")
    browser.find_element("css selector", "[data-zoom=in]").click()
    zoomed = view(browser)
    assert zoomed[1] - zoomed[0] == pytest.approx((whole[1] - whole[0]) / 2)
    canvas.send_keys(webdriver.Keys.ARROW_RIGHT)
    moved = view(browser)
    assert moved[0] > zoomed[0]
    assert moved[1] - moved[0] == pytest.approx(zoomed[1] - zoomed[0])
    actions = webdriver.ActionChains(browser)
    actions.drag_and_drop_by_offset(canvas, 120, 0).perform()
    assert view(browser)[0] < moved[0]
    before = view(browser)
    browser.execute_script(
        "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -1, ctrlKey: true, cancelable: true}))", canvas
    )
    assert view(browser)[1] - view(browser)[0] < before[1] - before[0]
    browser.find_element("css selector", "[data-zoom=all]").click()
    assert view(browser) == whole


def test_pointing_at_a_span_explains_it(open_report: Open, tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    browser = open_report(tmp_path / "r")
    browser.execute_script(  # the first row below the axis and the first process's name, in the first round's time
        "const c = document.querySelector('#timeline canvas'), b = c.getBoundingClientRect();"
        "const x = Timeline.LABEL + 20, y = Timeline.AXIS + Timeline.HEAD + 5;"
        "c.dispatchEvent(new PointerEvent('pointermove', {clientX: b.x + x, clientY: b.y + y}))"
    )
    assert text_of(browser, "#tooltip") == ["training, compute round 0\nclient 0\n400.0 ms, from 0.00 s"]


def test_runs_are_chosen_and_compared(open_report: Open, tmp_path: Path) -> None:
    write_run(tmp_path / "demo" / "sequential", staleness=0, wall_s=4.2)
    write_run(tmp_path / "demo" / "parallel", rounds=4)
    browser = open_report(tmp_path / "demo")
    boxes = browser.find_elements("css selector", "#runs input")
    assert len(boxes) == len(text_of(browser, "#verdict p")) == 2
    assert len(text_of(browser, "tr[data-key=wall_s] td")) == 3
    longer = view(browser)
    names = text_of(browser, "#runs label:not(.in-detail)")
    boxes[names.index("parallel")].click()
    assert [text.partition(":")[0] for text in text_of(browser, "#verdict p")] == ["sequential"]
    assert text_of(browser, "tr[data-key=wall_s] td")[1:] == ["4.20 s"]
    assert set(text_of(browser, "[data-focus]")) == {"sequential"}  # what is not shown cannot be in detail either
    boxes[names.index("sequential")].click()
    assert boxes[names.index("sequential")].is_selected()  # one run always stays
    options = browser.find_elements("css selector", "#detail option")
    options[names.index("parallel")].click()
    assert len(text_of(browser, "#verdict p")) == 2
    assert set(text_of(browser, "[data-focus]")) == {"parallel"}
    assert view(browser)[0] == longer[0] == 0


def test_a_hundred_thousand_spans_are_drawn_with_a_mark_a_pixel_at_most(open_report: Open, tmp_path: Path) -> None:
    write_run(tmp_path / "r", rounds=250, chunks=200)
    browser = open_report(tmp_path / "r")
    spans = browser.execute_script("return runs[0].timeline.start.length")
    assert spans > 100_000
    drawn = int(browser.execute_script("return document.querySelector('#timeline canvas').dataset.drawn"))
    assert 0 < drawn < 13 * 1280  # tracks × pixels
    browser.execute_script("timeline.zoom(0.001)")
    assert 0 < int(browser.execute_script("return document.querySelector('#timeline canvas').dataset.drawn")) < 500


def test_a_damaged_folder_is_shown_with_what_is_missing(open_report: Open, tmp_path: Path) -> None:
    write_run(tmp_path / "r")
    (tmp_path / "r" / "trace.json").unlink()
    for seat in (0, 1):
        (tmp_path / "r" / f"client-{seat}" / "trace.json").write_text("{")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    (tmp_path / "r" / "summary.json").write_text(json.dumps({**summary, "version": 9, "wall_s": None, "clients": {}}))
    browser = open_report(tmp_path / "r")
    notes = text_of(browser, "#notes li")
    assert len(notes) == 4
    assert any("version 9" in note for note in notes)
    assert text_of(browser, "#timeline .none") == ["This run recorded no timeline."]
    assert len(text_of(browser, ".tile")) > 3
    assert text_of(browser, ".tile[data-key=wall_s]") == []


def test_a_folder_with_hardly_anything_still_makes_a_page(open_report: Open, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "metrics.jsonl").write_text('{"round": 0, "loss": null}\n{"round": 1}\n')
    browser = open_report(tmp_path / "r")
    assert len(text_of(browser, "#notes li")) == 2
    assert "not known" in text_of(browser, "#verdict p")[0]
