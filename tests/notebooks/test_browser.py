"""What a user does: open notebook 00 in JupyterLab in a browser, run it, move what can be moved, save it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from cut import WIDGETS, write

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.processes,
    pytest.mark.xdist_group("notebooks"),  # beside nothing that keeps its core busy for long
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
    pytest.mark.timeout(300),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


def git(folder, *words):
    """What git says in a folder."""
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a checkout of its own, without a token, on a free port of the loopback: its address and folder."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "data/paper", "data/reference"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in (".gitignore", "Makefile"):
        shutil.copy(ROOT / name, folder)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", "all")
    subprocess.run(["make", "copies"], cwd=folder, check=True, timeout=60)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", "--ServerApp.port_retries=0"]
    options += ["--IdentityProvider.token=", "--ServerApp.password=", f"--notebook-dir={folder / 'lab'}"]
    with open(folder / "lab" / "lab.log", "w") as log:
        environment = {**os.environ, "SALVIT_ROOT": str(folder)}
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "lab" / "lab.log").read_text()
                time.sleep(0.25)
        yield address, folder
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def page(lab):
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{lab[0]}/lab/tree/00_start_here.ipynb?reset")
        yield page
        browser.close()


def drawn(shown):
    """The picture or the table of a widget, as the browser has it."""
    return shown.evaluate("it => it.src || it.innerHTML")


def settled(tab, read, before):
    """What is read once it is no longer what it was, or after a minute at the latest."""
    deadline = time.monotonic() + 60
    while (after := read()) == before and time.monotonic() < deadline:
        tab.wait_for_timeout(200)
    return after


def test_a_slider_changes_the_figure(page, tmp_path):
    page.wait_for_selector(".jp-Notebook", timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)  # run before the kernel is up, and nothing runs
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    slider = page.locator(".widget-slider .noUi-handle").first
    # Attached, not visible: JupyterLab does not lay out cells that are scrolled away.
    slider.wait_for(state="attached", timeout=120_000)
    slider.scroll_into_view_if_needed()
    # The slider's own: another picture, of what a network would cost, stands above it.
    shown = page.locator(".jp-OutputArea-output").filter(has=page.locator(".widget-slider")).first
    picture = shown.locator("img.widget-image").first
    picture.wait_for(timeout=60_000)
    before = drawn(picture)
    slider.click()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    after = settled(page, lambda: drawn(picture), before)
    page.screenshot(path=tmp_path / "slider.png")
    assert before and after != before
    reading = page.locator(".widget-readout").first.inner_text()
    assert float(reading) > 1.0
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0


def test_another_method_changes_the_bars_and_not_the_axes(page, tmp_path):
    """Driven by the estimate: rounds and bytes of a method beside those of SA softmax, along the same axes."""
    shown = page.locator(".jp-OutputArea-output").filter(has=page.locator(".widget-dropdown")).first
    shown.locator("select").wait_for(state="attached", timeout=120_000)
    assert shown.locator(".widget-label").first.inner_text() == "method"
    picture = shown.locator("img.widget-image").first
    picture.scroll_into_view_if_needed()
    before = drawn(picture)
    shown.locator("select").select_option("EA scaling")
    after = settled(page, lambda: drawn(picture), before)
    page.screenshot(path=tmp_path / "method.png")
    assert before and after != before


def test_a_notebook_that_was_run_and_saved_is_no_change_to_git(page, lab):
    """Outputs, figures and records: after the tests above, which ran all of it."""
    _, folder = lab
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.get_by_text("Save Notebook", exact=True).click()
    saved = folder / "lab" / "00_start_here.ipynb"
    deadline = time.monotonic() + 60
    while '"image/png"' not in saved.read_text() and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    assert '"image/png"' in saved.read_text() and (folder / "figures" / "tour_shares.png").exists()
    assert list((folder / "data" / "runs" / "encrypted").glob("digits*.json"))
    assert git(folder, "status", "--porcelain") == ""


def test_a_newer_notebook_of_the_project_leaves_the_copy_that_was_worked_on(lab):
    _, folder = lab
    original, copy = (folder / place / "01_attention_latency.ipynb" for place in ("notebooks", "lab"))
    first = original.read_text()
    copy.write_text("worked on")
    for newer, there, kept in ((-100, "worked on", []), (100, first, ["worked on"])):
        os.utime(original, (when := copy.stat().st_mtime + newer, when))
        subprocess.run(["make", "copies"], cwd=folder, check=True, timeout=60)
        assert copy.read_text() == there
        assert [path.read_text() for path in copy.parent.glob(f"{copy.name}.~*")] == kept
    assert git(folder, "status", "--porcelain") == ""


ERRORS = ".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']"


@pytest.mark.parametrize("number", WIDGETS)
def test_every_control_of_a_notebook_moves_what_stands_below_it(page, lab, number, tmp_path):
    """In a tab of its own, of the notebook cut down to what its widget needs."""
    address, folder = lab
    write(number, folder / "lab" / f"moved_{number}.ipynb")
    tab = page.context.browser.new_page(viewport=page.viewport_size)
    tab.goto(f"{address}/lab/workspaces/moved-{number}/tree/moved_{number}.ipynb?reset")
    tab.wait_for_selector(".jp-Notebook", timeout=60_000)
    tab.get_by_text("| Idle").wait_for(timeout=60_000)
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_text("Run All Cells", exact=True).click()
    tab.locator(f".widget-vbox .widget-inline-hbox, {ERRORS}").first.wait_for(state="attached", timeout=200_000)
    assert tab.locator(ERRORS).all_inner_texts() == []
    shown = tab.locator(".jp-OutputArea-output").filter(has=tab.locator(".widget-vbox")).last
    shown.scroll_into_view_if_needed()
    below = shown.locator("img.widget-image, .widget-html table")
    below.wait_for(timeout=60_000)
    controls = shown.locator(".widget-inline-hbox").filter(has=tab.locator("select, .noUi-handle"))
    assert controls.count()
    for control in controls.all():
        label = control.locator("label").inner_text()
        assert label
        before = drawn(below)
        if control.locator("select").count():
            choice = control.locator("select")
            others = choice.evaluate("it => [...it.options].map(each => each.value).filter(one => one !== it.value)")
            choice.select_option(others[0])
        else:
            control.locator(".noUi-handle").click()
            tab.keyboard.press("ArrowRight")
        after = settled(tab, lambda: drawn(below), before)
        tab.screenshot(path=tmp_path / f"moved_{number}.png")
        assert after != before, label
        assert tab.locator(ERRORS).all_inner_texts() == []
    tab.close()
