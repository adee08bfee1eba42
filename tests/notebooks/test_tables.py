"""The rule by which tables of notebooks are held to a width, against a browser."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import tables

CSS = Path(__file__).parents[2] / "docs" / "static" / "wide.css"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def executed(root, table, **options):
    folder = root / "figures" / "executed"
    folder.mkdir(parents=True)
    cell = {"id": "7", "outputs": [{"data": {"text/html": [table.to_html(**options)]}}]}
    (folder / "05_one.ipynb").write_text(json.dumps({"cells": [{"id": "0"}, cell]}))
    return root


def levels(columns):
    names = pd.MultiIndex.from_product([["stock", "tuned"], [f"quantity {i}" for i in range(columns)]])
    index = pd.MultiIndex.from_product([["cifar10"], ["SA softmax", "Nystromformer L2Q"]], names=["dataset", "method"])
    return pd.DataFrame(1234.567, index=index, columns=names)


def test_what_is_too_wide_or_not_rounded_is_named(tmp_path):
    table = levels(7)
    assert tables.faults(executed(tmp_path / "wide", table)) == [
        f"05_one, cell 7: {tables.width(table.to_html()):.0f} pixels wide: ['', '']"
    ]
    assert tables.faults(executed(tmp_path / "narrow", levels(3))) == []
    numbers = pd.DataFrame({"a": ["0.00018", "1321.2600", "12345.678", "0.7791", "1.123456"]})
    assert tables.faults(executed(tmp_path / "long", numbers)) == [
        "05_one, cell 7: not rounded: ['1321.2600', '1.123456']"
    ]


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_a_browser_makes_tables_as_wide_as_the_rule_says():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    listing = pd.DataFrame(
        {"study": ["private"] * 2, "key": "166b3e23", "date": "2026-11-21 17:30", "torch": "2.13.0+cpu"}
    )
    capitals = pd.DataFrame({"MFLOPs": [1.0], "SAL-ViT B=3 (KD)": ["normaliser 71%"]}, index=["WAN (CrypTFlow2)"])
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        for table in (levels(2), levels(7), listing, capitals):
            made = table.to_html()
            page_ = (
                "html { font: 110% sans-serif } div.content { width: 9999px; max-width: none }"  # as the book's theme
            )
            style = f"<style>{CSS.read_text()} {page_}</style>"
            page.set_content(f"{style}<div class='content'><div class='cell_output'>{made}</div></div>")
            pixels = page.eval_on_selector("table", "table => table.getBoundingClientRect().width")
            assert tables.width(made) == pytest.approx(pixels, rel=0.07), table.columns
        browser.close()
