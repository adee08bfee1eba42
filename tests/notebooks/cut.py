"""A notebook cut down to what one of its widgets needs, over the project's own records or something smaller."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "notebooks"
# Words of the cells that a widget reads, in order, after imports and parameters; the widget's own is the last. Not ids:
# stripping a notebook numbers its cells anew.
WIDGETS = {
    "01": ("def by_layer(", "explore("),
    "02": ("def l2q(", "def curves(", "explore("),
    "03": ("accuracy.plan(", "accuracy.with_costs(", "explore("),
    "04": ("LearnedRun(run)", "parameter_ranges(", "def maps(", "explore("),
    "06": ("efficient.plan(", "efficient.with_weights(", "def look(", "explore("),
    "07": ("bits_on_shares.trainings(", "bits_on_shares.cost_table(", "explore("),
    "08": ("replaced.plan(", "replaced.priced(configs)", "explore("),
    "09": ("def cost_bar(", "explore("),
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
    every = json.loads(path.read_text())["cells"]
    imports, parameters, *code = ["".join(cell["source"]) for cell in every if cell["cell_type"] == "code"]
    found = [[source for source in code if words in source] for words in WIDGETS[number]]
    assert all(len(each) == 1 for each in found), f"notebook {number}: one cell with each of {WIDGETS[number]}"
    return [imports, f"{parameters}\n{SMALL.get(number, RECORDS)}", *(source for (source,) in found)]


def write(number, path):
    """A notebook of those cells."""
    made = [
        {"cell_type": "code", "execution_count": None, "id": str(i), "metadata": {}, "outputs": [], "source": source}
        for i, source in enumerate(cells(number))
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
