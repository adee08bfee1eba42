"""How right the answers are: accuracy by variant and against a cost, and how far shares drift from the clear."""

import textwrap
from collections.abc import Sequence
from itertools import repeat

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .labels import compared, equal_scales, write_labels
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

FAR = 3  # times as much: on one linear axis the cheaper protocol's points would lie on one another


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
    letters = int(0.85 * WIDTH / len(panels) / len(variants) / 0.07)  # that fit below a variant
    wrapped = letters >= max(len(word) for variant in variants for word in str(variant).split())
    names = [textwrap.fill(str(variant), letters) if wrapped else str(variant) for variant in variants]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.9), squeeze=False, layout="constrained")
        for axis, (name, panel) in zip(axes[0], panels.items(), strict=True):
            for i, variant in enumerate(variants):
                values = panel.loc[panel["variant"] == variant, "accuracy"].dropna()
                if len(values):
                    axis.hlines(values.mean(), i - 0.3, i + 0.3, color=styles[variant].color, linewidth=3)
                    axis.scatter([i] * len(values), values, s=16, color="white", edgecolor="black", zorder=3)
            axis.set_xticks(range(len(variants)), names, rotation=0 if wrapped else 90)
            axis.set_ylabel("test accuracy (%)")
            axis.set_title(str(name))
        write_note(figure, note)
    return figure


def accuracy_against(
    panels: dict[str, pd.DataFrame], note: str = "", labels: dict[str, str] | None = None, log: bool = False
) -> Figure:
    """Accuracy against a cost, one panel per source or cost, so that sources are never mixed on one axis.

    Points are named where they are, if all names find room, and in a legend otherwise. Panels that differ in nothing
    but the protocol have equal cost axes, logarithmic where one protocol's costs are far from the other's.

    Args:
        panels: title to a table with columns method, x (the cost), accuracy (percent) and series: rows of one
            series are joined by a line and named where their method differs from it. Where it has x_low and x_high,
            or accuracy_low and accuracy_high, ranges are drawn.
        note: what was measured.
        labels: title to what x is; private latency in seconds where it is left out.
        log: logarithmic cost axes.

    Raises:
        ValueError: no panel, or an empty one.
    """
    refuse_empty_panels(panels, ("method", "series", "x", "accuracy"))
    styles = looks(*(table["series"] for table in panels.values()))
    tables = {title: table.dropna(subset=["x", "accuracy"]) for title, table in panels.items()}
    for group in compared(tables):
        costs = pd.concat([tables[title]["x"] for title in group])
        log = log or costs.max() > FAR * costs.min() > 0
    with plt.rc_context(STYLE):
        crowd = max(len(table) for table in tables.values())
        size = (WIDTH, max(3.2, 2.0 + 0.16 * crowd))
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
        names: list[tuple[Axes, float, float, str]] = []
        for axis, (title, table) in zip(axes[0], tables.items(), strict=True):
            for series, part in parts(table, "series"):
                part = part.sort_values("x")
                line = {**styles[series].line, "markersize": 5, "linewidth": 1.0}
                _write_ranges(axis, part, styles[series].color)
                axis.plot(part["x"], part["accuracy"], label=series, **line)
                names += zip(repeat(axis), part["x"], part["accuracy"], _names(str(series), part["method"]))
            axis.set_title(title)
            axis.set_xlabel((labels or {}).get(title, "private latency (s)"))
            axis.set_ylabel("test accuracy (%)")
            if log:
                axis.set_xscale("log")
            elif all(float(x).is_integer() for x in table["x"]):
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.margins(x=0.15, y=0.12)
        equal_scales(dict(zip(tables, axes[0], strict=True)), margin=0.15)
        if log:
            for axis in axes[0]:
                write_plainly(axis.xaxis)
        write_note(figure, note)
        if not write_labels(figure, names):
            write_legend(figure, 4)
            known = {str(series) for series in styles}  # the legend names these
            write_labels(figure, [(axis, x, y, "" if name in known else name) for axis, x, y, name in names])
    return figure


def _names(series: str, methods: pd.Series) -> list[str]:
    """What stands beside each point of a series: its method, and once, the series where that says more."""
    names = [str(method) for method in methods]
    if set(names) == {series}:
        return [series, *[""] * (len(names) - 1)]
    return [f"{series} {names[0]}" if len(names) > 1 and series not in names[0] else names[0], *names[1:]]


def _staggered(places: list[float], names: list[str]) -> list[str]:
    """Names under an axis, each a line lower than those that it would touch; places in inches, of their middles."""
    ends: list[float] = []  # of what stands in each line
    lowered = []
    for place, name in zip(places, names, strict=True):
        half = 0.04 * len(name) + 0.04
        line = next((i for i, end in enumerate(ends) if place - half > end), len(ends))
        ends[line : line + 1] = [place + half]
        lowered.append("\n" * line + name)
    return lowered


def _write_ranges(axis: Axes, part: pd.DataFrame, color: str) -> None:
    """Lines from the lowest to the highest cost and accuracy of each point, where the table has them."""
    for low, high, draw, ends in (
        ("x_low", "x_high", axis.hlines, "accuracy"),
        ("accuracy_low", "accuracy_high", axis.vlines, "x"),
    ):
        if {low, high} <= set(part):
            known = part.dropna(subset=[low, high])
            draw(known[ends], known[low], known[high], color=color, linewidth=0.9, zorder=1)


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
        layers = table.groupby("layer", sort=False, observed=True)["place"].agg(["min", "max"])
        middle, inch = (layers["min"] + layers["max"]) / 2, (WIDTH - 1) / max(1, layers["max"].max())
        for start in layers["min"].iloc[1:]:
            axis.axvline(start - 0.5, color="0.85", linewidth=0.6, zorder=0)
        axis.set_xticks(middle, _staggered(list(middle * inch), [str(layer) for layer in layers.index]))
        axis.tick_params(axis="x", length=0)
        axis.set_yscale("log")
        axis.set_ylabel("activations")
        write_legend(figure, 3)
        write_note(figure, note)
    return figure
