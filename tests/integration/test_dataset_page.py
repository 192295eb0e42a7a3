"""The dataset report in a real browser: over HTTP and from the disk, with no network and with hostile names."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from tasks.dataset.page import Totals, page
from tasks.dataset.rows import Row, csv, jsonl
from tests.support.published import FACES, failed_row, publish_files, published_row, refused_row

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]

# a container has neither user namespaces for the sandbox nor a GPU
BROWSER_ARGUMENTS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
EVIL = "<img src=x onerror=\"document.title='broken out'\">"
BREAKING_OUT = "boom </script><script>document.title = 'broken out'</script>"
TOTALS = Totals(finished_at=datetime(2026, 11, 22, tzinfo=UTC), seconds=60, reconstructed=2)
ROWS = [
    published_row("chairs/oak #1", seconds=9.0),
    published_row("mug", failed=["watertight"], seconds=30.0),
    published_row(EVIL, seconds=100.0),
    refused_row("lamp-2", 2),
    refused_row("lamp-10", 1),
    failed_row("kettle", BREAKING_OUT),
]
MANY = 10_000
WEBGL_TIMEOUT_MS = 120_000  # software rendering on a busy machine
SMALL: ViewportSize = {"width": 480, "height": 400}
LOAD_SECONDS = 10
SHOWN_PAGES = 100  # rows of the table at once
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with published assets, and three reports of them: of links, with meshes in it, and a huge one."""
    output = tmp_path_factory.mktemp("out put's")
    meshes = {row.id: publish_files(output, row) for row in ROWS if row.folder}
    many = [published_row(f"object-{index}", folder=ROWS[0].folder) for index in range(MANY)]
    for name, rows, embedded in (("linked", ROWS, None), ("embedded", ROWS, meshes), ("huge", many, None)):
        folder = output / name
        folder.mkdir()
        (folder / "index.html").write_bytes(page(name, rows, TOTALS, embedded))
        (folder / "report.csv").write_bytes(csv(rows))
        (folder / "report.jsonl").write_bytes(jsonl(rows))
    return output


@pytest.fixture(scope="module")
def served(output: Path) -> Iterator[str]:
    """The URL of the output over HTTP."""
    handler = partial(_Quiet, directory=str(output))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens a page; whatever goes wrong in it, or goes to another host, fails the test at its end."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    faults: list[str] = []
    requests: list[str] = []

    def visit(url: str) -> Page:
        tab = context.new_page()
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(url)
        return tab

    yield visit
    context.close()
    assert faults == []
    assert [url for url in requests if not url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:"))] == []


def from_disk(output: Path, name: str) -> str:
    return (output / name / "index.html").as_uri()


def captures(tab: Page) -> list[str]:
    """The ids in the table, from top to bottom."""
    return tab.locator("td.capture").all_inner_texts()


def sort(tab: Page, column: str) -> None:
    tab.get_by_role("columnheader", name=column, exact=True).get_by_role("button").click()


def open_mesh(tab: Page, row: Row) -> None:
    """Click a preview, and wait for the viewer to have drawn the mesh."""
    tab.locator("#gallery li").filter(has=tab.get_by_text(row.id, exact=True)).get_by_role("button").click()
    tab.wait_for_function("document.querySelector('model-viewer')?.loaded", timeout=WEBGL_TIMEOUT_MS)


def orbit(tab: Page) -> str:
    place: str = tab.evaluate("document.querySelector('model-viewer').getCameraOrbit().toString()")
    return place


def test_names_and_reasons_are_shown_and_do_nothing(opened: Open, output: Path) -> None:
    tab = opened(from_disk(output, "linked"))
    assert captures(tab) == [row.id for row in ROWS]
    expect(tab.get_by_role("cell", name=BREAKING_OUT)).to_be_visible()
    open_evil = tab.locator("td.capture").get_by_text(EVIL)
    open_evil.click()
    expect(tab.locator("#viewer-title")).to_have_text(EVIL)
    assert tab.title() == "linked · dataset report"
    assert tab.locator("img[src='x']").count() == 0


def test_every_preview_is_there(opened: Open, output: Path) -> None:
    tab = opened(from_disk(output, "linked"))
    pictures = tab.locator("#gallery img")
    expect(pictures).to_have_count(3)
    tab.wait_for_function("[...document.querySelectorAll('#gallery img')].every(img => img.naturalWidth === 40)")


def test_sorted_by_any_column_with_the_unknown_last(opened: Open, output: Path) -> None:
    tab = opened(from_disk(output, "linked"))
    seconds = ["chairs/oak #1", "mug", EVIL, "kettle"]
    sort(tab, "Seconds")
    assert captures(tab) == [*seconds, "lamp-2", "lamp-10"]
    sort(tab, "Seconds")
    assert captures(tab) == [*reversed(seconds), "lamp-2", "lamp-10"]
    assert tab.get_by_role("columnheader", name="Seconds", exact=True).get_attribute("aria-sort") == "descending"
    sort(tab, "Status")
    assert captures(tab) == ["kettle", "lamp-2", "lamp-10", "mug", "chairs/oak #1", EVIL]
    sort(tab, "Capture")
    assert captures(tab).index("lamp-2") < captures(tab).index("lamp-10")


def test_filtered_by_text_status_and_reason(opened: Open, output: Path) -> None:
    tab = opened(from_disk(output, "linked"))
    tab.get_by_role("searchbox").fill("LAMP depth")
    assert captures(tab) == ["lamp-2", "lamp-10"]
    expect(tab.locator("#gallery")).to_be_hidden()
    tab.get_by_role("button", name="Show all").click()
    assert len(captures(tab)) == len(ROWS)
    tab.locator("#states").get_by_role("button", name="failed").click()
    assert captures(tab) == ["kettle"]
    tab.locator("#states").get_by_role("button", name="invalid").click()
    assert captures(tab) == ["lamp-2", "lamp-10", "kettle"]
    tab.get_by_role("button", name="Show all").click()
    reason = tab.locator("#reasons").get_by_role("button", name="has no depth map")
    expect(reason).to_contain_text("2")
    reason.click()
    assert captures(tab) == ["lamp-2", "lamp-10"]
    assert reason.get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_click_on_a_preview_opens_the_mesh(opened: Open, output: Path, served: str, scheme: str) -> None:
    tab = opened(f"{served}/linked/" if scheme == "http" else from_disk(output, "embedded"))
    tab.set_viewport_size(SMALL)
    open_mesh(tab, ROWS[0])
    expect(tab.locator("#facts")).to_contain_text(f"{FACES} faces")
    before = orbit(tab)
    stage = tab.locator("model-viewer").bounding_box()
    assert stage is not None
    middle = (stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2)
    tab.mouse.move(*middle)
    tab.mouse.down()
    tab.mouse.move(middle[0] + 200, middle[1] + 40, steps=2)
    tab.mouse.up()
    tab.wait_for_function(
        "before => document.querySelector('model-viewer').getCameraOrbit().toString() !== before", arg=before
    )
    tab.get_by_role("button", name="Next mesh").click()
    expect(tab.locator("#viewer-title")).to_have_text(ROWS[1].id)
    tab.keyboard.press("Escape")
    expect(tab.locator("model-viewer")).to_have_count(0)


def test_from_the_disk_without_meshes_it_says_how_to_serve_them(opened: Open, output: Path) -> None:
    tab = opened(from_disk(output, "linked"))
    tab.locator("#gallery li").first.get_by_role("button").click()
    quoted = "'" + str(output).replace("'", "'\\''") + "'"
    expect(tab.locator("#stage code")).to_have_text(
        f"python3 -m http.server --bind 127.0.0.1 --directory {quoted} 8000"
    )
    expect(tab.locator("#stage a")).to_have_attribute("href", "http://127.0.0.1:8000/linked/")


def test_a_mesh_that_is_gone_is_told(browser: Browser, served: str, output: Path) -> None:
    (output / "gone").mkdir()
    gone = published_row("gone away")
    (output / "gone" / "index.html").write_bytes(page("gone", [gone], TOTALS))
    with browser.new_context() as context:
        tab = context.new_page()
        tab.goto(f"{served}/gone/")
        tab.locator("#gallery li").get_by_role("button").click()
        expect(tab.locator("#stage")).to_contain_text("could not be shown", timeout=WEBGL_TIMEOUT_MS)


def test_ten_thousand_captures_stay_usable(opened: Open, output: Path, served: str) -> None:
    tab = opened(f"{served}/huge/")
    loaded: float = tab.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd / 1000")
    assert loaded < LOAD_SECONDS
    assert len(captures(tab)) == SHOWN_PAGES
    tab.get_by_role("button", name="Next →").click()
    assert captures(tab)[0] == f"object-{SHOWN_PAGES}"
    tab.get_by_role("searchbox").fill(f"object-{MANY - 1}")
    assert captures(tab) == [f"object-{MANY - 1}"]
    tab.get_by_role("searchbox").fill("")
    before = tab.locator("#gallery li").count()
    tab.locator("#more").click()
    assert tab.locator("#gallery li").count() == 2 * before


@pytest.mark.parametrize(("width", "scheme"), [(420, "light"), (1400, "dark")])
def test_it_fits_a_phone_and_the_dark(browser: Browser, output: Path, width: int, scheme: Any) -> None:
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        tab = context.new_page()
        tab.goto(from_disk(output, "linked"))
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        red = int(tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
        assert red < 50 if scheme == "dark" else red > 200
