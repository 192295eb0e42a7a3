"""The manual run: a person at Prefect's UI signs in, fills the form, watches the run and opens what it made."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, expect, sync_playwright
from playwright.sync_api import TimeoutError as NotThere

from infra.stack import Stack
from tests.support.running import ROOT, wait_for
from tests.support.running_stack import PASSWORD, Running

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.system, pytest.mark.skipif(CHROMIUM is None, reason="no chromium")]

SCREENSHOTS = ROOT / "build" / "screenshots"  # what CI keeps
WINDOW = {"width": 1400, "height": 1000}
WHOLE_FORM = {"width": 1400, "height": 4800}
PATIENCE_MS, MENU_MS = 90_000, 3_000
RUN_SECONDS = 480
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
LEAST_CONTRAST = 10
# those of a small run; the voxels are no other test's, for its inference not to be a hit
NUMBERS = {"Voxels along the longest side": "63", "Face budget": "2000", "Floor: vertices": "100"}


class Person:
    """Someone at the UI of a stack, who clicks, and takes a picture of what is to be seen."""

    def __init__(self, stack: Running, browser: Browser) -> None:
        self.stack = stack
        self.page = browser.new_page(viewport=WINDOW)
        self.page.set_default_timeout(PATIENCE_MS)
        self.seen = 0

    def see(self, name: str) -> None:
        self.seen += 1
        self.page.screenshot(path=SCREENSHOTS / f"{self.seen:02d}-{name}.png")

    def link(self, name: str) -> Locator:
        return self.page.get_by_role("link", name=name, exact=True)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def tab(self, name: str) -> Locator:
        """Opens a tab; gives what is in it."""
        self.page.get_by_role("tab", name=name).click()
        return self.page.get_by_role("tabpanel")

    def sign_in(self) -> None:
        self.page.goto(Stack(self.stack.settings).ui)
        self.page.get_by_placeholder("admin:pass").fill(f"admin:{PASSWORD}")
        self.see("sign-in")
        self.button("Login").click()
        self.link("Deployments").click()
        expect(self.link("reconstruct")).to_be_visible()
        self.see("deployments")

    def open_form(self, capture: str) -> None:
        """The form of a run, its parameters small ones."""
        self.link("Deployments").first.click()
        row = self.page.get_by_role("row").filter(has=self.link("reconstruct"))
        row.get_by_role("link", name="default", exact=True).click()
        self.button("Run").click()
        self.page.get_by_role("menuitem", name="Custom run").click()
        self.page.get_by_role("textbox", name="capture").fill(capture)
        self.page.get_by_role("textbox", name="output").fill("s3://assets")
        for name, value in NUMBERS.items():
            self.number(name).fill(value)
        self.choose("Texture size (pixels)", "256")

    def number(self, name: str) -> Locator:
        return self.page.get_by_label(name)

    def choose(self, name: str, option: str) -> list[str]:
        """Choose from a list; gives all of it."""
        self.page.get_by_label(name).click()
        options = self.page.get_by_role("option")
        offered = options.all_inner_texts()
        options.get_by_text(option, exact=True).click()
        expect(options).to_have_count(0)  # the list fades away: another one opened meanwhile would have its options too
        return offered

    @property
    def run(self) -> str:
        """The id of the run whose page is open."""
        self.page.wait_for_url("**/runs/flow-run/*")
        (run,) = re.findall(r"flow-run/([0-9a-f-]+)", self.page.url)
        return run

    def submit(self) -> str:
        """Run, and open the run; gives its id. On SQLite the server is busy (503) now and then: one clicks again."""

        def submitted() -> bool:
            with self.page.expect_response("**/create_flow_run") as answer:
                self.button("Submit").click()
            return answer.value.ok

        wait_for("a run", submitted)
        self.button("View run").click()
        return self.run

    def choose_from_menu(self, name: str) -> Locator:
        """Choose what the run's menu offers; gives the dialog that asks whether one is sure.

        What it offers depends on the run's state, which the page asks for every few seconds.
        """
        item = self.page.get_by_role("menuitem", name=name)

        def offered() -> bool:
            self.button("Open menu").click()
            with suppress(NotThere):
                item.click(timeout=MENU_MS)
                return True
            self.page.keyboard.press("Escape")
            return False

        wait_for(f"{name} in the menu", offered)
        return self.page.get_by_role("alertdialog").or_(self.page.get_by_role("dialog"))

    def open_artifact(self, key: str) -> None:
        """An artifact of the run whose page is open; in between is a list of all with its key, of other runs too."""
        run = self.page.locator(f"a[href*='{self.run}']")
        artifact = self.page.locator("a[href*='/artifacts/artifact/']")
        self.tab("Artifacts").get_by_role("link", name=key).click()
        self.page.locator("div").filter(has=run).filter(has=artifact).last.locator(artifact).click()
        expect(self.page.get_by_role("tab", name="Raw")).to_be_visible()

    def shown(self, *states: str) -> None:
        """The page of a run comes to show one of the states, without being loaded again."""
        expect(self.page.get_by_text(re.compile(f"^({'|'.join(states)})$")).first).to_be_visible()


def assert_picture(picture: Locator) -> None:
    """What the browser shows is a picture, and no empty one."""
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 0
    with Image.open(io.BytesIO(picture.screenshot())) as pixels:
        assert np.asarray(pixels.convert("RGB")).std() > LEAST_CONTRAST


@pytest.fixture(scope="module")
def person(stack: Running) -> Iterator[Person]:
    shutil.rmtree(SCREENSHOTS, ignore_errors=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[OFFLINE])
        expect.set_options(timeout=PATIENCE_MS)
        try:
            person = Person(stack, browser)
            person.sign_in()
            yield person
        finally:
            browser.close()


def test_form_explains_itself_and_refuses_nonsense(person: Person) -> None:
    person.open_form("s3://captures/mug")
    name = person.page.get_by_label("Run Name").input_value()
    assert person.choose("engine", "fusion") == ["auto", "fusion", "trellis"]
    assert person.choose("Texture size (pixels)", "512") == ["256", "512", "1024", "2048", "4096"]
    assert person.choose("Exporter", "native") == ["auto", "native", "to_glb"]
    person.page.set_viewport_size(WHOLE_FORM)
    person.see("form")
    person.page.set_viewport_size(WINDOW)

    person.number("Seed").fill("-3")
    person.button("Submit").click()
    assert "greater than or equal to 0" in person.number("Seed").evaluate("field => field.validationMessage")
    person.see("refused-by-the-browser")
    person.number("Seed").fill("7")
    person.number("Share of faces removed").fill("1")
    person.button("Submit").click()
    refusal = person.page.get_by_text("1 is greater than or equal to the maximum of 1", exact=True)
    expect(refusal).to_be_visible()
    refusal.scroll_into_view_if_needed()
    person.see("refused-by-the-server")
    assert person.stack.ask("POST", "/flow_runs/count", flow_runs={"name": {"any_": [name]}}) == 0


def test_run_from_the_form_to_the_mesh(person: Person) -> None:
    person.open_form("s3://captures/mug")
    run = person.submit()
    dialog = person.choose_from_menu("Cancel")
    expect(dialog.get_by_role("button", name="Cancel Flow Run")).to_be_visible()
    person.see("cancel")
    dialog.get_by_role("button", name="Cancel", exact=True).click()
    person.shown("Running", "Completed")  # it is asked every few seconds: the first may be over before
    person.see("running")
    assert person.stack.ended(run, RUN_SECONDS)["state_name"] == "Completed", person.stack.logs
    person.shown("Completed")
    page = person.tab("Artifacts")
    expect(page.get_by_role("link")).to_have_count(5)
    expect(page.get_by_text("mug: normal")).to_be_visible()
    person.see("artifacts")

    person.open_artifact("report-mug")
    assert_picture(person.page.get_by_role("img", name="the mesh from several sides"))
    person.see("report")
    link = person.link("mesh.glb")
    assert httpx.get(link.get_attribute("href") or "").raise_for_status().content[:4] == b"glTF"
    with person.page.expect_download() as download:
        link.click()
    assert Path(download.value.path()).read_bytes()[:4] == b"glTF"

    person.link("mug").click()
    person.open_artifact("views-mug")
    assert_picture(person.page.get_by_role("img", name="input views"))
    person.see("views")
    person.link("mug").click()
    person.open_artifact("capture-mug")
    expect(person.page.get_by_role("cell", name="view_000")).to_be_visible()
    person.see("table-of-views")
    person.link("mug").click()
    person.open_artifact("mesh-mug")
    expect(person.link("mug: mesh.glb")).to_have_attribute("href", re.compile(r"/mesh\.glb$"))

    person.link("mug").click()
    person.tab("Subflow Runs").get_by_role("link", name="mug", exact=True).last.click()
    expect(person.page.get_by_text("Parent Run")).to_be_visible()
    person.open_artifact("infer")
    expect(person.page.get_by_text("Progress: 100%")).to_be_visible()
    person.see("progress")


@pytest.mark.faults
def test_failed_run_tells_why_and_is_retried(person: Person, capture: Callable[[str], Path]) -> None:
    person.open_form("s3://captures/late")
    run = person.submit()
    assert person.stack.ended(run, RUN_SECONDS)["state_name"] == "Failed", person.stack.logs
    person.shown("Failed")
    expect(person.tab("Details").get_by_text("s3://captures/late: no capture there")).to_be_visible()
    person.see("failed")

    Stack(person.stack.settings).s3.upload(capture("late"), "late")
    dialog = person.choose_from_menu("Retry")
    person.see("retry")
    dialog.get_by_role("button", name="Retry").click()
    wait_for("the retry", lambda: person.stack.read(run)["state_name"] != "Failed")
    assert person.stack.ended(run, RUN_SECONDS)["state_name"] == "Completed", person.stack.logs
    person.shown("Completed")
    person.see("retried")
