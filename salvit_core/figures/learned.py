"""Normalisers and what they learn: their curves, and the C and D of L2Q by layer and head."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .registry import LOOKS
from .style import STYLE, WIDTH, looks, parts, refuse_empty, write_legend, write_note


def normalizer_curves(table: pd.DataFrame, note: str = "") -> Figure:
    """Attention weights over scores, one curve per normaliser.

    Args:
        table: columns score, weight, normalizer.
        note: what is shown.

    Raises:
        ValueError: the table is empty.
    """
    refuse_empty(table, ("normalizer", "score", "weight"))
    styles = looks(table["normalizer"])
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH * 0.75, 2.9), layout="constrained")
        for name, curve in parts(table, "normalizer"):
            line = {**styles[name].line, "markersize": 4, "markevery": 0.15, "linewidth": 1.4}
            axis.plot(curve["score"], curve["weight"], label=name, **line)
        axis.set_xlabel("score a")
        axis.set_ylabel("attention weight")
        write_legend(figure, 4)
        write_note(figure, note)
    return figure


def parameter_ranges(table: pd.DataFrame, note: str = "") -> Figure:
    """Figure 9: range and variance of the learnt C and D by layer.

    Args:
        table: columns layer, head, parameter ("c", "d"), mean, variance, low, high.
        note: what was measured.

    Raises:
        ValueError: the table is empty, or has nothing of C or of D.
    """
    names = ("c", "d")
    refuse_empty(table, ("layer", "parameter", "mean", "variance", "low", "high"))
    for name in names:
        refuse_empty(table[table["parameter"] == name], name=f"the table of parameter {name!r}")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 3.8), sharex=True, layout="constrained")
        for column, name in enumerate(names):
            part = table[table["parameter"] == name].groupby("layer", observed=True)
            layers, drawn = list(part.groups), LOOKS[f"L2Q, {name.upper()} only"]
            low, high = part["low"].min(), part["high"].max()
            axes[0][column].vlines(layers, low, high, color=drawn.color, linewidth=6, alpha=0.5)
            axes[0][column].scatter(layers, part["mean"].mean(), color="black", s=12, zorder=3, label="mean")
            axes[0][column].axhline(1.0, color="0.5", linestyle=":", linewidth=0.8, label="initial value")
            axes[0][column].set_title(f"{name.upper()}: range")
            axes[1][column].bar(layers, part["variance"].mean(), **drawn.bar)
            axes[1][column].set_title(f"{name.upper()}: variance")
            axes[1][column].set_xlabel("layer")
            axes[1][column].set_xticks(layers)
        write_legend(figure, 2)
        write_note(figure, note)
    return figure


def scatter_by_layer(table: pd.DataFrame, x: str, panels: dict[str, str], note: str = "") -> Figure:
    """One point per head, coloured and marked by layer, a panel per quantity.

    Args:
        table: columns layer, head, `x`, and those that `panels` names.
        x: column along the horizontal axis.
        panels: column to the label of its axis.
        note: what was measured.

    Raises:
        ValueError: the table is empty, or one of the quantities in it.
    """
    for column in panels:
        refuse_empty(table, ("layer", x, column))
    table = table.sort_values("layer", kind="stable")
    styles = looks(table["layer"])
    with plt.rc_context(STYLE):
        rows = 2 if len(panels) > 3 and len(panels) % 2 == 0 else 1
        size = (WIDTH, 0.6 + 2.0 * rows)
        figure, axes = plt.subplots(rows, len(panels) // rows, figsize=size, squeeze=False, layout="constrained")
        for axis, (column, label) in zip(axes.flat, panels.items(), strict=True):
            for layer, part in parts(table, "layer"):
                axis.scatter(part[x], part[column], label=f"layer {layer}", **styles[layer].point)
            axis.set_xlabel(x)
            axis.set_ylabel(label)
        write_legend(figure, 7)
        write_note(figure, note)
    return figure
