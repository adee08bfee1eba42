"""What notebooks and pages of the book say in words."""

import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "notebooks"


@functools.cache
def prose(number: str) -> str:
    """A notebook's markdown, on one line."""
    (path,) = FOLDER.glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text())["cells"]
    return " ".join(" ".join("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown")


@functools.cache
def page(name: str) -> str:
    """A page of the book as it is written, on one line."""
    return " ".join((FOLDER.parent / "docs" / name).read_text().split())


def held(where: str, *said: str) -> None:
    """Every sentence stands in a notebook's prose, by its number, or on a page, wherever its lines break."""
    text = page(where) if where.endswith(".md") else prose(where)
    lacking = [sentence for sentence in said if sentence not in text]
    assert not lacking, lacking
