"""How fast the web app is with many entries: `python -m benchmarks.app [--entries N] [--rounds N]`.

Fills a registry of made-up entries, starts `zoo app` on it again and again, and does in Chromium what people
do. Seconds, as a person sees them: until the server answers, until a page of entries is there, and until
only what a search found is left; medians, and the least and the most, after one warm-up round. Aims for
10,000 entries: 3, 1 and half a second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.browser import PER_PAGE, cards, clear, found, launched, patient, search, served, settled
from tests.many import fill
from zoo.machine import this_machine

SEARCHES = ("mpt-25m", "llama-2-13b", "4of16")


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def measure(tab: Page, address: str, pages: int = 1) -> dict[str, list[float]]:
    """Seconds of each opening of the first page, and of each of the SEARCHES."""

    def opened() -> None:
        tab.goto(address)
        expect(cards(tab).nth(PER_PAGE - 1)).to_be_visible()

    opened()  # the server's first page also reads its own files
    settled(tab)
    times: dict[str, list[float]] = {"page": [seconds(opened) for _ in range(pages)], "search": []}
    settled(tab)
    everything = found(tab)
    for text in SEARCHES:
        times["search"].append(seconds(lambda text=text: search(tab, text, everything)))  # type: ignore[misc]
        clear(tab, everything)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"start": [], "page": [], "search": []}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        registry = Path(folder) / "registry.db"
        fill(str(registry), options.entries)
        browser = launched(playwright)
        for number in range(options.rounds + 1):
            with (
                served(registry, Path(folder) / "store") as (address, start),
                browser.new_context() as context,
            ):
                once = {"start": [start], **measure(patient(context.new_page()), address)}
            for name, values in once.items() if number else ():
                times[name] += values
        browser.close()
    print(f"{options.entries:,} entries, {this_machine().cpu}")
    print(f"{'':8}{'median':>8}{'least':>8}{'most':>8}   seconds")
    for name, values in times.items():
        print(f"{name:8}{statistics.median(values):8.2f}{min(values):8.2f}{max(values):8.2f}")


if __name__ == "__main__":
    main()
