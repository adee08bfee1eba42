"""The tables that executed notebooks show: how wide they are, and whether their numbers are rounded."""

import html
import json
import re
from pathlib import Path

MOST = 1100  # pixels
PADDING = 11  # pixels, left and right of a cell in docs/static/wide.css
# Pixels of a letter, those of a heading's bold ones; a test compares the whole with a browser.
PIXELS = {"fijltI.,:;'!|/ ": 4.0, "r()[]-": 4.6, "mwMW%@": 11.5, "ABCDEFGHJKLNOPQRSTUVXYZ": 9.0}
OTHERS = 7.2


def shown(root: Path) -> list[tuple[str, str]]:
    """(notebook and cell, HTML of a table) of all executed notebooks."""
    found = []
    for path in sorted((root / "figures" / "executed").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", []):
                text = "".join(output.get("data", {}).get("text/html", ""))
                found += [
                    (f"{path.stem}, cell {cell['id']}", each) for each in re.findall(r"<table.*?</table>", text, re.S)
                ]
    return found


def cells(table: str) -> list[list[str]]:
    """The text of each row's cells; a heading over several columns is left out."""
    rows = re.findall(r"<tr.*?</tr>", table, re.S)
    parts = [re.findall(r"<t[hd]([^>]*)>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [
        [html.unescape(re.sub("<.*?>", "", text)).strip() for kind, text in row if "colspan" not in kind]
        for row in parts
    ]


def width(table: str) -> float:
    """How wide a table is at most, in pixels: by the longest text of each column."""
    longest: dict[int, float] = {}
    for row in cells(table):
        for place, text in enumerate(reversed(row)):  # a row lacks first those cells that reach down from above
            pixels = sum(next((size for some, size in PIXELS.items() if letter in some), OTHERS) for letter in text)
            longest[place] = max(longest.get(place, 0), pixels)
    return sum(pixels + PADDING for pixels in longest.values())


def unrounded(table: str) -> list[str]:
    """Numbers with more than three decimals and more than five digits that say something."""
    numbers = [text for row in cells(table) for text in row if re.fullmatch(r"-?\d+\.\d{4,}", text)]
    return [text for text in numbers if len(text.lstrip("-0.").replace(".", "")) > 5]


def faults(root: Path) -> list[str]:
    """What is too wide or not rounded, by notebook and cell."""
    found = []
    for where, table in shown(root):
        if (pixels := width(table)) > MOST:
            found.append(f"{where}: {pixels:.0f} pixels wide: {cells(table)[0]}")
        if numbers := unrounded(table):
            found.append(f"{where}: not rounded: {numbers[:3]}")
    return found
