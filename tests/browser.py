"""The web app's server, and a browser's view of it: for tests, and for the benchmark of the app."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Browser, Locator, Page, Playwright, expect

CHROMIUM = shutil.which("chromium")
# Chromium has no user namespaces for its sandbox as root; and it is not to look for its maker's servers.
FLAGS = [
    f"--{flag}"
    for flag in (
        "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync",
    )
]  # fmt: skip
PATIENCE_S = 60.0
PER_PAGE = 24


@contextmanager
def served(registry: Path, store: Path) -> Iterator[tuple[str, float]]:
    """`zoo app` in a process of its own: its address, and the seconds until it answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "zoo.cli", "app", "--port", str(port)]
    command += ["--registry", str(registry), "--store", str(store)]
    log = registry.with_suffix(".log")
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            try:
                urlopen(f"{address}/_stcore/health", timeout=1).read()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() - began < PATIENCE_S
                time.sleep(0.02)
        yield address, time.monotonic() - began
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE_S)
    assert "Traceback" not in log.read_text(), log.read_text()


def launched(playwright: Playwright) -> Browser:
    return playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


def patient(page: Page) -> Page:
    page.set_default_timeout(PATIENCE_S * 1000)
    expect.set_options(timeout=PATIENCE_S * 1000)
    return page


def settled(tab: Page) -> None:
    """Wait until no run of the page is on."""
    expect(tab.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")
    expect(tab.get_by_test_id("stApp")).to_have_attribute("data-test-connection-state", "CONNECTED")


def cards(tab: Page) -> Locator:
    """Links to the entries of this page, in order."""
    return tab.locator("[data-testid=stMain] [data-testid=stPageLink] a[href*='entry?id=']")


def found(tab: Page) -> int:
    """How many entries the page says there are."""
    said = tab.get_by_text(re.compile(r"of [\d,]+ entr(y|ies)")).inner_text()
    return int(re.sub(r".* of ([\d,]+) .*", r"\1", said).replace(",", ""))


def search(tab: Page, text: str, everything: int) -> None:
    """Search all the entries that the page shows; returns when only those that have it are left."""
    tab.get_by_label("Search").fill(text)
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("link", name=re.compile(text)).first).to_be_visible()
    expect(tab.get_by_text(f"of {everything:,} entries")).to_have_count(0)


def clear(tab: Page, everything: int) -> None:
    tab.get_by_role("button", name="Clear filters").first.click()
    expect(tab.get_by_text(f"of {everything:,} entries")).to_be_visible()
    settled(tab)
