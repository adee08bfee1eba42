"""What a private inference costs: by kind of operation, and as a fraction of the baseline's beside the paper's."""

from collections.abc import Hashable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import STYLE, WIDTH, Look, look, looks, order, refuse_empty, refuse_empty_panels, write_legend, write_note

# What stands behind the kinds of operation in a stack: the dealer's seconds, and what a modelled link adds.
BESIDES: dict[Hashable, Look] = {"offline": Look("0.4", "////", (1, 0), "o"), "link": Look("0.8", "....", (1, 0), "s")}


def stacked_kinds(
    panels: dict[str, pd.DataFrame],
    spread: pd.DataFrame | None = None,
    note: str = "",
    ends: Mapping[str, float] | None = None,
) -> Figure:
    """What each method costs, stacked by kind of operation, one panel per quantity.

    Args:
        panels: axis label, such as "seconds", to a table with one row per method (drawn from the top) and one column
            per kind of operation, NaN where a method has none; columns "offline" and "link" are stacked behind them.
            Kinds are stacked and coloured in the order of the categories of the columns, if any panel's are
            Categorical, and in that of the columns otherwise.
        spread: for the first panel: one row per method with the columns low and high of its total.
        note: what was measured, on what; printed under the figure.
        ends: axis label to the value that its axis goes to, so that figures of other methods compare with this one.

    Raises:
        ValueError: no panel, or an empty one.
    """
    refuse_empty_panels(panels)
    kinds = [kind for kind in order(*(table.columns for table in panels.values())) if kind not in BESIDES]
    with plt.rc_context(STYLE):
        rows = len(next(iter(panels.values())))
        figure, axes = plt.subplots(
            1, len(panels), figsize=(WIDTH, 1.5 + 0.24 * rows), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, (label, table) in zip(axes[0], panels.items(), strict=True):
            left = pd.Series(0.0, index=table.index)
            for kind, drawn in (looks(kinds) | BESIDES).items():
                if kind not in table.columns:
                    continue
                length = table[kind].fillna(0.0)
                names = table.index.astype(str)
                axis.barh(names, length, left=left, height=0.72, linewidth=0.3, label=kind, **drawn.bar)
                left = left + length
            axis.set_xlabel(label)
            axis.margins(x=0.02)
            if ends is not None and label in ends:
                axis.set_xlim(0, 1.02 * ends[label])
        if spread is not None:
            total = next(iter(panels.values())).sum(axis=1)
            error = [(total - spread["low"]).clip(lower=0), (spread["high"] - total).clip(lower=0)]
            whisker = {"ecolor": "black", "elinewidth": 0.8, "capsize": 2}
            axes[0][0].errorbar(total, total.index.astype(str), xerr=error, fmt="none", **whisker)
        axes[0][0].invert_yaxis()
        write_legend(figure, 5, handlelength=2.4)
        write_note(figure, note)
    return figure


def ratios_beside_paper(table: pd.DataFrame, note: str = "", baseline: str = "the baseline") -> Figure:
    """Latency as a fraction of the baseline's: ours (two accountings) and the paper's, one row per method.

    Args:
        table: indexed by method, with columns complete, without_layernorm and paper (NaN where the paper has none).
        note: what was measured, on what.
        baseline: the method whose latency is 1.

    Raises:
        ValueError: the table is empty, or lacks a column.
    """
    labels = {
        "complete": "ours, complete",
        "without_layernorm": "ours, without LayerNorm (as in the paper)",
        "paper": "paper",
    }
    refuse_empty(table, labels, whole=False)
    table = table[list(labels)].rename(index=str)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.24 * len(table)), layout="constrained")
        axis.hlines(table.index, table.min(axis=1), table.max(axis=1), color="0.8", linewidth=2, zorder=1)
        for place, (column, label) in enumerate(labels.items()):
            drawn = look(place)
            face = drawn.color if column != "paper" else "white"
            marker: dict[str, Any] = {"marker": drawn.marker, "color": face, "edgecolor": drawn.color}
            known = table[column].dropna()  # the paper may have none of them
            if len(known):
                axis.scatter(known, known.index, s=26, label=label, zorder=2, **marker)
        axis.axvline(1.0, color="0.5", linewidth=0.8, linestyle=":")
        axis.set_xlim(left=0)
        axis.set_xlabel(f"latency / latency of {baseline}")
        axis.invert_yaxis()
        write_legend(figure, 3)
        write_note(figure, note)
    return figure
