"""How right the answers are: accuracy by variant and against a cost, and how far shares drift from the clear."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

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


def accuracy_by_variant(table: pd.DataFrame, known: Sequence[str] = (), note: str = "") -> Figure:
    """Test accuracy of variants of one network, a panel per data set: a dot per seed, a bar at their mean.

    Args:
        table: columns dataset, variant, seed, accuracy (percent), in the order to draw.
        known: all variants of the study in order, where the column variant is not Categorical and so carries none.
        note: what was measured.

    Raises:
        ValueError: the table is empty.
    """
    refuse_empty(table, ("dataset", "variant", "accuracy"))
    panels = dict(parts(table, "dataset"))
    variants = [variant for variant, _ in parts(table, "variant")]
    styles = looks(pd.CategoricalIndex(list(known), list(known)), table["variant"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.9), squeeze=False, layout="constrained")
        for axis, (name, panel) in zip(axes[0], panels.items(), strict=True):
            for i, variant in enumerate(variants):
                values = panel.loc[panel["variant"] == variant, "accuracy"].dropna()
                if len(values):
                    axis.hlines(values.mean(), i - 0.3, i + 0.3, color=styles[variant].color, linewidth=3)
                    axis.scatter([i] * len(values), values, s=16, color="white", edgecolor="black", zorder=3)
            axis.set_xticks(range(len(variants)), variants, rotation=30, ha="right")
            axis.set_ylabel("test accuracy (%)")
            axis.set_title(str(name))
        write_note(figure, note)
    return figure


def accuracy_against(
    panels: dict[str, pd.DataFrame], note: str = "", labels: dict[str, str] | None = None, log: bool = False
) -> Figure:
    """Accuracy against a cost, one panel per source or cost, so that sources are never mixed on one axis.

    Args:
        panels: title to a table with columns method, x (the cost), accuracy (percent) and series: rows of one
            series are joined by a line and named where their method differs from it.
        note: what was measured.
        labels: title to what x is; private latency in seconds where it is left out.
        log: logarithmic cost axes.

    Raises:
        ValueError: no panel, or an empty one.
    """
    refuse_empty_panels(panels, ("method", "series", "x", "accuracy"))
    styles = looks(*(table["series"] for table in panels.values()))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.6), squeeze=False, layout="constrained")
        for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
            for series, part in parts(table.dropna(subset=["x", "accuracy"]), "series"):
                part = part.sort_values("x")
                line = {**styles[series].line, "markersize": 5, "linewidth": 1.0}
                axis.plot(part["x"], part["accuracy"], label=series, **line)
                for _, row in part[part["method"] != series].iterrows():
                    place = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 5.5}
                    axis.annotate(row["method"], (row["x"], row["accuracy"]), **place)
            axis.set_title(title)
            axis.set_xlabel((labels or {}).get(title, "private latency (s)"))
            if log:
                axis.set_xscale("log")
                write_plainly(axis.xaxis)
            axis.set_ylabel("test accuracy (%)")
            axis.margins(x=0.15, y=0.12)
        write_legend(figure, 4)
        write_note(figure, note)
    return figure


def drift(table: pd.DataFrame, note: str = "") -> Figure:
    """How far activations on shares are from the clear ones, module after module, beside their size.

    Args:
        table: columns series, node, layer, error and scale (largest absolute difference and largest absolute value).
        note: what was measured.

    Raises:
        ValueError: the table is empty.
    """
    refuse_empty(table, ("series", "node", "layer", "error", "scale"))
    styles = looks(table["series"])
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 3.0), layout="constrained")
        # A module may be called more than once: its calls stand in the order in which the first series made them.
        count = table.groupby(["series", "node"], observed=True).cumcount().astype(str)
        call = table["node"].astype(str) + "#" + count
        table = table.assign(place=call.map({name: i for i, name in enumerate(call.unique())}))
        for i, (series, part) in enumerate(parts(table, "series")):
            part = part.sort_values("place")
            if i == 0:
                axis.plot(part["place"], part["scale"], color="0.6", linewidth=1, label="largest clear value")
            line = {**styles[series].line, "markersize": 2.5, "linewidth": 1}
            axis.plot(part["place"], part["error"], label=f"largest difference, {series}", **line)
        layers = table.groupby("layer", sort=False, observed=True)["place"].agg(["min", "mean"])
        for start in layers["min"].iloc[1:]:
            axis.axvline(start - 0.5, color="0.85", linewidth=0.6, zorder=0)
        axis.set_xticks(layers["mean"], layers.index, rotation=30, ha="right", rotation_mode="anchor")
        axis.tick_params(axis="x", length=0)
        axis.set_yscale("log")
        axis.set_ylabel("activations")
        write_legend(figure, 3)
        write_note(figure, note)
    return figure
