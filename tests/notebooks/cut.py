"""A notebook cut down to what one of its widgets needs, over the project's own records or something smaller."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "notebooks"
# Ids of the cells in order: imports, parameters, and what the widget reads; the widget's own is the last.
WIDGETS = {
    "01": ("1", "2", "20", "21"),
    "02": ("1", "2", "l2q", "draw", "sliders"),
    "03": ("1", "2", "4", "10", "21"),
    "04": ("1", "2", "3", "5", "7", "8"),
    "06": ("1", "2", "4", "15", "16", "17"),
    "07": ("1", "2", "4", "6", "8", "waits"),
    "08": ("1", "2", "4", "13", "waits"),
    "09": ("1", "2", "19", "20"),
}
RECORDS = 'profile, records = "reference", "reference"'
# What stands for the cells that are left out, where these would measure or train more than a test may.
SMALL = {
    "01": """size, network, note = profiles.profile("smoke"), "cct_4_3x1", "as a test draws it"
known = {name: preset(network, name) for name in size.methods}
rows = {name: latency.estimated(known, name).assign(seconds=1.0) for name in ("stock", "tuned")}""",
    "06": 'profile, note = "smoke", "as a test draws it"',  # trained here: maps need weights and images
    "09": 'network = "cct_4_3x1"',
}


def cells(number):
    """Sources of those cells, the parameters followed by what is another here."""
    (path,) = FOLDER.glob(f"{number}_*.ipynb")
    by_id = {cell["id"]: "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]}
    found = [by_id[name] for name in WIDGETS[number]]
    found[1] += "\n" + SMALL.get(number, RECORDS)
    return found


def write(number, path):
    """A notebook of those cells."""
    made = [
        {"cell_type": "code", "execution_count": None, "id": str(i), "metadata": {}, "outputs": [], "source": source}
        for i, source in enumerate(cells(number))
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
