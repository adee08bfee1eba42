"""What a private inference costs: by kind of operation, and as a fraction of the baseline's beside the paper's."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .labels import compared, equal_scales
from .registry import BESIDES
from .style import STYLE, WIDTH, looks, order, refuse_empty, refuse_empty_panels, write_legend, write_note

RANGE = ["low", "high"]
SLIM = 4  # a panel whose bars are that many times shorter than those it is compared with is drawn once more, enlarged


def stacked_kinds(panels: dict[str, pd.DataFrame], note: str = "", ends: Mapping[str, float] | None = None) -> Figure:
    """What each method costs, stacked by kind of operation, one panel per quantity.

    Panels that differ in nothing but the protocol have equal axes.

    Args:
        panels: axis label, such as "seconds", to a table with one row per method (drawn from the top) and one column
            per kind of operation, NaN where a method has none; columns "offline" and "link" are stacked behind them,
            and a line is drawn from "low" to "high", the range of the total. Kinds are stacked in the order of the
            categories of the columns, if any panel's are Categorical, and in that of the columns otherwise.
        note: what was measured, on what; printed under the figure.
        ends: axis label to the value that its axis goes to, so that figures of other methods compare with this one;
            of panels with equal axes, the larger one's.

    Raises:
        ValueError: no panel, or an empty one.
    """
    refuse_empty_panels(panels)
    beside = {*BESIDES, *RANGE}
    kinds = [kind for kind in order(*(table.columns for table in panels.values())) if kind not in beside]
    styles = looks([*kinds, *BESIDES])
    most = {label: table.drop(columns=RANGE, errors="ignore").sum(axis=1).max() for label, table in panels.items()}
    most, ends = most | dict(ends or {}), dict(ends or {})
    for group in compared(panels):
        longest = max(most[label] for label in group)
        for label in [label for label in group if SLIM * most[label] < longest]:
            panels = panels | {f"{label},\nenlarged": panels[label]}
            ends |= {f"{label},\nenlarged": ends[label]} if label in ends else {}
        ends |= {label: longest for label in group if label in ends}
    with plt.rc_context(STYLE):
        rows = len(next(iter(panels.values())))
        figure, axes = plt.subplots(
            1, len(panels), figsize=(WIDTH, 1.5 + 0.24 * rows), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, (label, table) in zip(axes[0], panels.items(), strict=True):
            left = np.zeros(len(table))
            for kind, drawn in styles.items():
                if kind not in table.columns:
                    continue
                length = table[kind].fillna(0.0).to_numpy()
                names = table.index.astype(str)
                axis.barh(names, length, left=left, height=0.72, linewidth=0.3, label=kind, **drawn.bar)
                left = left + length
            if set(RANGE) <= set(table.columns):
                low, high = (table[end].to_numpy() for end in RANGE)
                error = np.maximum(0, [left - low, high - left])
                whisker = {"ecolor": "black", "elinewidth": 0.8, "capsize": 2}
                axis.errorbar(left, table.index.astype(str), xerr=error, fmt="none", **whisker)
            axis.set_xlabel(label)
            axis.use_sticky_edges = False  # of a kind without length, at the end of the bar
            axis.margins(x=0.04)
        equal_scales(dict(zip(panels, axes[0], strict=True)), margin=0.04)
        for axis, label in zip(axes[0], panels, strict=True):
            axis.set_xlim(0, 1.04 * ends[label] if label in ends else None)
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
    # Whose they are, in black and grey: colours are the methods'.
    labels: dict[str, tuple[str, dict[str, Any]]] = {
        "complete": ("ours, complete", {"marker": "o", "color": "black"}),
        "without_layernorm": ("ours, without LayerNorm (as in the paper)", {"marker": "s", "color": "0.6"}),
        "paper": ("paper", {"marker": "D", "color": "white"}),
    }
    refuse_empty(table, labels, whole=False)
    table = table[list(labels)].rename(index=str)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.24 * len(table)), layout="constrained")
        axis.hlines(table.index, table.min(axis=1), table.max(axis=1), color="0.8", linewidth=2, zorder=1)
        for column, (label, marker) in labels.items():
            known = table[column].dropna()  # the paper may have none of them
            if len(known):
                axis.scatter(known, known.index, s=26, label=label, zorder=2, edgecolor="black", **marker)
        axis.axvline(1.0, color="0.5", linewidth=0.8, linestyle=":")
        axis.set_xlim(left=0)
        axis.set_xlabel(f"latency / latency of {baseline}")
        axis.invert_yaxis()
        write_legend(figure, 3)
        write_note(figure, note)
    return figure
