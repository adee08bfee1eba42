"""Any quantity: one row per method with a marker per column, or curves over one variable."""

from collections.abc import Collection

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .labels import equal_scales
from .style import (
    STYLE,
    WIDTH,
    looks,
    parts,
    refuse_empty,
    refuse_empty_panels,
    write_legend,
    write_note,
    write_plainly,
)


def dots(panels: dict[str, pd.DataFrame], label: str, log: bool = False, note: str = "") -> Figure:
    """One row per method, one marker per column, a line from the least to the most; a panel per table.

    Linear axes are equal; logarithmic ones where panels differ in nothing but the protocol.

    Args:
        panels: title to a table indexed by method (drawn from the top), all with the same rows and columns; NaN is
            left out, and so is a row of which no panel has a value.
        label: of the horizontal axes.
        log: logarithmic axes.
        note: what was measured, what modelled.

    Raises:
        ValueError: no panel, or an empty one.
    """
    refuse_empty_panels(panels)
    styles = looks(*(table.columns for table in panels.values()))
    known = np.any([table.notna().any(axis=1) for table in panels.values()], axis=0)
    panels = {title: table[known] for title, table in panels.items()}
    with plt.rc_context(STYLE):
        rows = len(next(iter(panels.values())))
        most = max(float(table.to_numpy(float, na_value=0.0).max()) for table in panels.values())
        figure, axes = plt.subplots(
            1, len(panels), figsize=(WIDTH, 1.3 + 0.24 * rows), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
            places = range(len(table))
            axis.hlines(places, table.min(axis=1), table.max(axis=1), color="0.8", linewidth=2, zorder=1)
            for i, column in enumerate(table):
                # A dot, then ever larger hollow markers around it, so that equal values are all seen.
                drawn = styles[column]
                marker = {"marker": drawn.marker, "s": 12 + 22 * i, "edgecolor": drawn.color, "linewidth": 1.2}
                marker["facecolor"] = "none" if i else drawn.color
                # A marker at zero is as whole as the others.
                axis.scatter(table[column], places, label=column, zorder=3 - i / 10, clip_on=False, **marker)
            axis.set_yticks(places, table.index)
            axis.set_ylim(-0.6, rows - 0.4)
            axis.set_title(title)
            axis.set_xlabel(label)
            axis.margins(x=0.08)
            if log:
                axis.set_xscale("log")
            else:
                axis.set_xlim(0, 1.08 * most or 1.0)
        if log:
            equal_scales(dict(zip(panels, axes[0], strict=True)))
        for axis in axes[0] if log else ():
            write_plainly(axis.xaxis)
        axes[0][0].invert_yaxis()
        write_legend(figure, 5)
        write_note(figure, note)
    return figure


def curves(
    table: pd.DataFrame, x: str, panels: dict[str, str], log: Collection[str] = (), base: int = 10, note: str = ""
) -> Figure:
    """Quantities over one variable, one line per series, a panel per quantity.

    Args:
        table: columns series, `x`, and those that `panels` names. Of a column for which there are also COLUMN_low and
            COLUMN_high, the range is drawn.
        x: column along the horizontal axis.
        panels: column to the label of its axis.
        log: columns whose axes are logarithmic.
        base: of the horizontal axis where it is logarithmic.
        note: what was measured, what modelled.

    Raises:
        ValueError: the table is empty, or one of the quantities in it.
    """
    for column in panels:
        refuse_empty(table, ("series", x, column))
    styles = looks(table["series"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.6), squeeze=False, layout="constrained")
        ticks = sorted(table[x].dropna().unique())
        for axis, (column, label) in zip(axes[0], panels.items(), strict=True):
            for series, part in parts(table, "series"):
                axis.plot(part[x], part[column], label=series, markersize=4, linewidth=1.2, **styles[series].line)
                if {low := f"{column}_low", high := f"{column}_high"} <= set(part):
                    known = part.dropna(subset=[low, high])
                    axis.vlines(known[x], known[low], known[high], color=styles[series].color, linewidth=0.9, zorder=1)
            if x in log:
                axis.set_xscale("log", base=base)
            axis.set_xticks(ticks, ticks)
            axis.minorticks_off()
            if column in log:
                axis.set_yscale("log")
                write_plainly(axis.yaxis)
            else:
                axis.set_ylim(0, 1.1 * table[column].max() or 1.0)
            axis.set_xlabel(x)
            axis.set_ylabel(label)
        write_legend(figure, 4)
        write_note(figure, note)
    return figure
