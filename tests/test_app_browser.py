"""The web app as a person meets it: a real server, driven in Debian's Chromium through Playwright."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.example import entry
from tests.job_worker import behave, write_jobs
from tests.many import fill
from tests.scheduler import Place, running
from tests.test_app import HOSTILE, fail_a_job, hostile
from zoo.registry import open_registry

pytest.importorskip("streamlit", reason="the extra [app] is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="the extra [dev] is not installed")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

from benchmarks.app import measure  # noqa: E402
from tests.browser import (  # noqa: E402
    CHROMIUM,
    PATIENCE_S,
    PER_PAGE,
    cards,
    clear,
    found,
    launched,
    patient,
    search,
    served,
    settled,
)

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"),
]
MANY = 10_000
# Seconds that the issue asks for; other programs may use this machine too, so the assertion is generous.
FIRST_PAGE_S, FILTER_S, START_S, GENEROUS = 1.0, 0.5, 3.0, 5.0


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = launched(playwright)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Browser) -> Iterator[Page]:
    with chromium.new_context(viewport={"width": 1280, "height": 900}) as context:
        yield patient(context.new_page())


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, float]]:
    folder = tmp_path_factory.mktemp("many")
    fill(str(folder / "registry.db"), MANY)
    fail_a_job(open_registry(str(folder / "registry.db")), "a-job")
    with served(folder / "registry.db", folder / "store") as found:
        yield found


def parameters(tab: Page) -> dict[str, list[str]]:
    return parse_qs(urlsplit(tab.url).query)


def entries(tab: Page) -> list[str]:
    return cards(tab).all_inner_texts()


def test_the_journey(many: tuple[str, float], tab: Page, chromium: Browser) -> None:
    """Browse, filter, entry, compare, Pareto; and each URL restores its view in another browser's tab."""
    address, _ = many
    tab.goto(address)
    everything = found(tab)
    assert MANY * 0.9 < everything < MANY  # without the failed ones

    tab.get_by_label("Search").fill("8:16 w4")
    tab.keyboard.press("Enter")
    expect(tab.get_by_text(f"of {everything:,} entries")).to_have_count(0)
    expect(cards(tab)).to_have_text([re.compile("8of16-w4")] * PER_PAGE)
    assert 0 < found(tab) < everything

    boxes = tab.get_by_role("main").get_by_role("checkbox", name="Compare")
    for position in (0, 1):
        tab.locator("[data-testid=stMain] [data-testid=stCheckbox] label").filter(has_text="Compare").nth(
            position
        ).click()
        expect(boxes.nth(position)).to_be_checked()
    tab.wait_for_url(lambda url: len(parse_qs(urlsplit(url).query).get("pick", [])) == 2)
    picked = parameters(tab)["pick"]
    assert set(picked) == set(entries(tab)[:2])
    view, shown = tab.url, entries(tab)

    with chromium.new_context() as other:
        restored = other.new_page()
        restored.goto(view)
        expect(cards(restored)).to_have_text(shown, timeout=PATIENCE_S * 1000)
        assert restored.get_by_label("Search").input_value() == "8:16 w4"

    tab.get_by_role("link", name=picked[0]).last.click()
    expect(tab.get_by_role("heading", name=picked[0])).to_be_visible()
    assert parameters(tab) == {"id": [picked[0]]}
    tab.get_by_role("tab", name="Recipe").click()
    expect(tab.get_by_text("Lineage")).to_be_visible()
    assert parameters(tab)["tab"] == ["Recipe"]

    tab.go_back()
    expect(tab.get_by_role("link", name="Compare 2")).to_be_visible()
    assert parameters(tab) == parse_qs(urlsplit(view).query)
    expect(cards(tab)).to_have_text(shown)
    tab.get_by_role("link", name="Compare 2").click()
    tab.wait_for_url("**/compare?*")
    expect(tab.get_by_role("cell", name="bits per weight")).to_be_visible()
    assert parameters(tab)["entry"] == picked

    tab.get_by_role("tab", name="Pareto").click()
    expect(tab.locator("[data-testid=stVegaLiteChart]")).to_be_visible()
    settled(tab)
    tab.reload()
    expect(tab.get_by_role("tab", name="Pareto")).to_have_attribute("aria-selected", "true")
    expect(tab.locator("[data-testid=stVegaLiteChart]")).to_be_visible()
    settled(tab)
    for form, start in (("CSV", b"id,"), ("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with tab.expect_download() as download:
            tab.get_by_test_id("stDownloadButton").filter(has_text=form).locator("button").click()
        assert Path(download.value.path()).read_bytes().startswith(start)

    mark = tab.locator("[data-testid=stVegaLiteChart] .mark-symbol path[aria-roledescription='point']").first
    mark.click(force=True)
    tab.wait_for_url("**/entry?id=*")
    expect(tab.get_by_role("tab", name="Run it")).to_be_visible()


def test_ten_thousand_entries_are_quick(many: tuple[str, float], tab: Page) -> None:
    address, start = many
    times = measure(tab, address, pages=3)
    first, filter_ = min(times["page"]), sorted(times["search"])[1]
    print(f"\n{MANY} entries: started in {start:.2f} s, first page {first:.2f} s, a filter {filter_:.2f} s")
    assert start < GENEROUS * START_S
    assert first < GENEROUS * FIRST_PAGE_S
    assert filter_ < GENEROUS * FILTER_S


def test_a_search_leaves_what_it_finds(many: tuple[str, float], tab: Page) -> None:
    address, _ = many
    tab.goto(address)
    expect(cards(tab).nth(PER_PAGE - 1)).to_be_visible()
    everything = found(tab)
    search(tab, "mpt-25m", everything)
    settled(tab)
    assert 0 < found(tab) < everything
    assert all("mpt-25m" in name for name in entries(tab))
    clear(tab, everything)
    assert cards(tab).count() == PER_PAGE and found(tab) == everything


def test_no_script_of_an_entry_runs(tmp_path: Path, tab: Page) -> None:
    registry = open_registry(str(tmp_path / "registry.db"))
    registry.put(hostile())
    registry.put(entry("b-llama"))
    run_id = registry.start_run(HOSTILE, "ab" * 32, 1, HOSTILE)
    registry.finish_run(run_id, "failed", failure=HOSTILE)
    fail_a_job(registry, HOSTILE)
    dialogs: list[str] = []
    asked: list[str] = []
    tab.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: asked.append(request.url))
    with served(tmp_path / "registry.db", tmp_path / "store") as (address, _):
        views = [
            "",
            "?view=Table",
            "runs",
            "jobs",
            "compare?entry=a-llama&entry=b-llama",
            "compare?entry=a-llama&show=Pareto",
        ]
        views += ["compare?entry=a-llama&entry=b-llama&show=Recipes", "entry?id=<img src=x onerror=alert(1)>"]
        views += [
            f"entry?id=a-llama&tab={name}"
            for name in ("Run it", "Compression", "Accuracy", "Speed", "Files", "Recipe", "Card")
        ]
        for view in views:
            tab.goto(f"{address}/{view}")
            main = tab.get_by_test_id("stMain")
            expect(main.locator("h1, h2, [role=alert]").first).to_be_visible()
            settled(tab)
            assert main.locator("script").count() == 0, view
            assert main.locator("img[src='x'], img[src*='h.invalid'], [onerror]").count() == 0, view
            assert main.locator("a[href^='javascript']").count() == 0, view
            assert tab.get_by_test_id("stException").count() == 0, view
    assert dialogs == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def test_jobs_are_shown_live(tmp_path: Path, tab: Page) -> None:
    """Of a real scheduler: a job that is done, one that fails, one whose scheduler is killed meanwhile."""
    place = Place(tmp_path, str(tmp_path / "registry.db"))
    open_registry(place.registry_url)
    write_jobs(tmp_path, ["done", "fails", "killed"])
    behave(place.store, "fails", "fail")
    behave(place.store, "killed", "sleep")
    with served(tmp_path / "registry.db", place.store) as (address, _):
        tab.goto(f"{address}/jobs")
        expect(tab.get_by_text("No job has run yet.")).to_be_visible()
        with running(place.start("--keep-going", "--max-parallel", "3")) as process:
            expect(tab.get_by_text("3 jobs by their last run: 1 running, 1 done, 1 failed")).to_be_visible()
            expect(tab.get_by_text("it cannot work")).to_be_visible()
            process.kill()
        expect(tab.get_by_text("Its scheduler is gone.")).to_be_visible()
        tab.get_by_text("failed", exact=True).first.click()
        expect(tab.get_by_text("Its scheduler is gone.")).to_have_count(0)
        assert parameters(tab) == {"last": ["failed"]}
        tab.reload()
        expect(tab.get_by_text("it cannot work")).to_be_visible()
        expect(tab.get_by_text("Its scheduler is gone.")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(many: tuple[str, float], chromium: Browser, scheme: str) -> None:
    address, _ = many
    with chromium.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme) as context:  # type: ignore[arg-type]
        tab = context.new_page()
        tab.set_default_timeout(PATIENCE_S * 1000)
        tab.goto(address)
        expect(cards(tab).nth(PER_PAGE - 1)).to_be_visible(timeout=PATIENCE_S * 1000)
        name = entries(tab)[0]
        for view in (
            "",
            "runs",
            "jobs",
            "try",
            f"compare?entry={name}",
            f"entry?id={name}",
            f"entry?id={name}&tab=Accuracy",
        ):
            tab.goto(f"{address}/{view}")
            expect(tab.get_by_test_id("stMain").locator("h1, h2").first).to_be_visible()
            settled(tab)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390, view
        background = tab.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", background)[:3])) > 3 * 128
        assert light == (scheme == "light")
