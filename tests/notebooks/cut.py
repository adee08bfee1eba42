"""A notebook cut down to what one of its widgets needs, over the project's own records."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "notebooks"
# Ids of the cells in order: imports, parameters, and what the widget reads; the widget's own is the last.
WIDGETS = {
    "02": ("1", "2", "l2q", "draw", "sliders"),
    "03": ("1", "2", "4", "10", "21"),
    "04": ("1", "2", "3", "5", "7", "8"),
    "07": ("1", "2", "4", "6", "8", "waits"),
    "08": ("1", "2", "4", "13", "waits"),
}


def cells(number):
    """Sources of those cells, of profile reference and its records."""
    (path,) = FOLDER.glob(f"{number}_*.ipynb")
    by_id = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]}
    found = [by_id[name] for name in WIDGETS[number]]
    settings = found[1].replace('profile = "quick"', 'profile = "reference"')
    found[1] = settings.replace('records = "local"', 'records = "reference"')
    return found


def write(number, path):
    """A notebook of those cells."""
    made = [
        {"cell_type": "code", "execution_count": None, "id": str(i), "metadata": {}, "outputs": [], "source": source}
        for i, source in enumerate(cells(number))
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
