"""What a search for an architecture did."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import STYLE, WIDTH, looks, parts, refuse_empty, write_legend, write_note


def trajectories(table: pd.DataFrame, note: str = "") -> Figure:
    """The selection parameters over the epochs of a search, one line per layer, a panel per search.

    Args:
        table: columns search, layer, epoch, alpha.
        note: what was measured.

    Raises:
        ValueError: the table is empty.
    """
    refuse_empty(table, ("search", "layer", "epoch", "alpha"))
    panels = dict(parts(table, "search"))
    styles = looks(table["layer"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(WIDTH, 2.6), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, (name, panel) in zip(axes[0], panels.items(), strict=True):
            for layer, path in parts(panel, "layer"):
                line = {**styles[layer].line, "markersize": 3}
                axis.plot(path["epoch"], path["alpha"], label=f"layer {layer}", **line)
            axis.set_title(str(name))
            axis.set_xlabel("epoch of the search")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0][0].set_ylabel(r"$\alpha$")
        write_legend(figure, 7)
        write_note(figure, note)
    return figure
