"""Tables in, matplotlib figures out, all in one style; nothing here computes a result.

Every figure is readable without colour: bars carry hatches, curves differ in dash and marker.
"""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from . import records
from .graph import KINDS

# Loads the backend now. A notebook's turns interactive drawing on when it is loaded: were that at the first figure,
# which is made in an rc_context, leaving it would turn that off, and every figure but the first would stay unseen.
plt.switch_backend(plt.get_backend())

WIDTH = 7.0  # inches: the text width of a two-column paper
PALETTE = sns.color_palette("colorblind", 10).as_hex()
HATCHES = ("", "///", "\\\\\\", "...", "xxx", "---", "|||", "+++", "ooo", "OO")
DASHES = ((1, 0), (4, 1), (1, 1), (4, 1, 1, 1), (6, 2))

# What stands beside the kinds of operation in a stack: the dealer's seconds, and what a modelled link adds.
BESIDES = {"offline": ("0.45", "////"), "link": ("0.75", "....")}

NORMALIZER_STYLE = {
    name: (PALETTE[i], DASHES[i]) for i, name in enumerate(("softmax", "2quad", "2relu", "l2q", "scaling"))
}

# Lines: a method looks the same in every figure. The first ten, which are drawn together most, differ in colour.
_METHODS = (
    "SAL-ViT", "SA softmax", "SA 2Quad", "SA L2Q", "EA softmax", "EA L2Q", "SA scaling", "SA 2Quad (KD)",
    "SAL-ViT (KD)", "MPCViT", "MPCViT (KD)", "Linformer", "CosFormer", "Performer", "Nystromformer", "SOFT",
    "Hamburger", "Dilated hybrid", "Linformer, heads", "Linformer L2Q", "Nystromformer L2Q", "Dilated L2Q",
    "Performer ReLU", "SA separate", "SA 2ReLU", "EA 2Quad", "EA 2ReLU", "EA scaling", "SAL-ViT B=1", "SAL-ViT B=2",
    "SAL-ViT B=3",
)  # fmt: skip

STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.4,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
}


def _look(series: str, drawn: list[str]) -> dict:
    """Colour, dashes and marker of a method, or of another series by its place among those drawn."""
    i = _METHODS.index(series) if series in _METHODS else drawn.index(series)
    dashes = DASHES[i % len(DASHES)]
    return {"color": PALETTE[i % len(PALETTE)], "dashes": dashes, "marker": "osD^vP*Xh<>p"[i % 12]}


def stacked_kinds(panels: dict[str, pd.DataFrame], spread: pd.DataFrame | None = None, note: str = "") -> Figure:
    """What each method costs, stacked by kind of operation, one panel per quantity.

    Args:
        panels: axis label, such as "seconds", to a table with one row per method (drawn from the top) and one column
            per kind of operation; columns "offline" and "link" are stacked behind them.
        spread: for the first panel: one row per method with the columns low and high of its total.
        note: what was measured, on what; printed under the figure.
    """
    with plt.rc_context(STYLE):
        rows = len(next(iter(panels.values())))
        figure, axes = plt.subplots(
            1, len(panels), figsize=(WIDTH, 1.5 + 0.24 * rows), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, (label, table) in zip(axes[0], panels.items(), strict=True):
            left = pd.Series(0.0, index=table.index)
            looks = {kind: (PALETTE[i % len(PALETTE)], HATCHES[i % len(HATCHES)]) for i, kind in enumerate(KINDS)}
            for kind, (color, hatch) in {**looks, **BESIDES}.items():
                if kind not in table:
                    continue
                axis.barh(
                    table.index,
                    table[kind],
                    left=left,
                    height=0.72,
                    color=color,
                    hatch=hatch,
                    edgecolor="white",
                    linewidth=0.3,
                    label=kind,
                )
                left = left + table[kind]
            axis.set_xlabel(label)
            axis.margins(x=0.02)
        if spread is not None:
            total = next(iter(panels.values())).sum(axis=1)
            error = [(total - spread["low"]).clip(lower=0), (spread["high"] - total).clip(lower=0)]
            axes[0][0].errorbar(total, total.index, xerr=error, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        axes[0][0].invert_yaxis()
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5, handlelength=2.4)
        _note(figure, note)
    return figure


def ratios_beside_paper(table: pd.DataFrame, note: str = "") -> Figure:
    """Latency as a fraction of the baseline's: ours (two accountings) and the paper's, one row per method.

    Args:
        table: indexed by method, with columns complete, without_layernorm and paper (NaN where the paper has none).
        note: what was measured, on what.
    """
    markers = {
        "complete": ("o", "ours, complete"),
        "without_layernorm": ("s", "ours, without LayerNorm (as in the paper)"),
        "paper": ("D", "paper"),
    }
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.24 * len(table)), layout="constrained")
        axis.hlines(table.index, table.min(axis=1), table.max(axis=1), color="0.8", linewidth=2, zorder=1)
        for i, (column, (marker, label)) in enumerate(markers.items()):
            face = PALETTE[i] if column != "paper" else "white"
            axis.scatter(
                table[column], table.index, marker=marker, s=26, color=face, edgecolor=PALETTE[i], label=label, zorder=2
            )
        axis.axvline(1.0, color="0.5", linewidth=0.8, linestyle=":")
        axis.set_xlim(left=0)
        axis.set_xlabel("latency / latency of SA softmax")
        axis.invert_yaxis()
        figure.legend(loc="outside upper center", ncols=3)
        _note(figure, note)
    return figure


def normalizer_curves(table: pd.DataFrame, note: str = "") -> Figure:
    """Attention weights over scores, one curve per normaliser.

    Args:
        table: columns score, weight, normalizer.
        note: what is shown.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH * 0.75, 2.9), layout="constrained")
        for name, curve in table.groupby("normalizer", sort=False):
            color, dashes = NORMALIZER_STYLE[name]
            axis.plot(curve["score"], curve["weight"], color=color, dashes=dashes, linewidth=1.6, label=name)
        axis.set_xlabel("score a")
        axis.set_ylabel("attention weight")
        axis.legend(loc="upper center")
        _note(figure, note)
    return figure


def accuracy_by_variant(table: pd.DataFrame, known: list[str], note: str = "") -> Figure:
    """Test accuracy of variants of one network, a panel per data set: a dot per seed, a bar at their mean.

    Args:
        table: columns dataset, variant, seed, accuracy (percent), in the order to draw.
        known: all variants of the study, in whose order colours are given: one per variant in every figure.
        note: what was measured.
    """
    sets = table["dataset"].unique()
    variants = table["variant"].unique()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(sets), figsize=(WIDTH, 2.9), squeeze=False, layout="constrained")
        for axis, name in zip(axes[0], sets, strict=True):
            part = table[table["dataset"] == name]
            for i, variant in enumerate(variants):
                values = part.loc[part["variant"] == variant, "accuracy"]
                if len(values):
                    axis.hlines(values.mean(), i - 0.3, i + 0.3, color=PALETTE[known.index(variant)], linewidth=3)
                    axis.scatter([i] * len(values), values, s=16, color="white", edgecolor="black", zorder=3)
            axis.set_xticks(range(len(variants)), variants, rotation=30, ha="right")
            axis.set_ylabel("test accuracy (%)")
            axis.set_title(name)
        _note(figure, note)
    return figure


def trajectories(table: pd.DataFrame, note: str = "") -> Figure:
    """The selection parameters over the epochs of a search, one line per layer, a panel per search.

    Args:
        table: columns search, layer, epoch, alpha.
        note: what was measured.
    """
    searches = table["search"].unique()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(searches), figsize=(WIDTH, 2.6), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, name in zip(axes[0], searches, strict=True):
            for i, (layer, path) in enumerate(table[table["search"] == name].groupby("layer", sort=False)):
                axis.plot(
                    path["epoch"],
                    path["alpha"],
                    color=PALETTE[i % len(PALETTE)],
                    dashes=DASHES[i % len(DASHES)],
                    marker="osD^vP*"[i % 7],
                    markersize=3,
                    label=f"layer {layer}",
                )
            axis.set_title(name)
            axis.set_xlabel("epoch of the search")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0][0].set_ylabel(r"$\alpha$")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=7)
        _note(figure, note)
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
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.6), squeeze=False, layout="constrained")
        known = list(dict.fromkeys(name for table in panels.values() for name in table["series"]))
        handles = {}
        for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
            for series, part in table.groupby("series", sort=False):
                part = part.sort_values("x")
                look = {**_look(series, known), "markersize": 5, "linewidth": 1.0}
                (handles[series],) = axis.plot(part["x"], part["accuracy"], **look)
                for _, row in part[part["method"] != series].iterrows():
                    place = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 5.5}
                    axis.annotate(row["method"], (row["x"], row["accuracy"]), **place)
            axis.set_title(title)
            axis.set_xlabel((labels or {}).get(title, "private latency (s)"))
            if log:
                axis.set_xscale("log")
                _plain(axis.xaxis)
            axis.set_ylabel("test accuracy (%)")
            axis.margins(x=0.15, y=0.12)
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
        _note(figure, note)
    return figure


def parameter_ranges(table: pd.DataFrame, note: str = "") -> Figure:
    """Figure 9: range and variance of the learnt C and D by layer.

    Args:
        table: columns layer, head, parameter ("c", "d"), mean, variance, low, high.
        note: what was measured.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 3.8), sharex=True, layout="constrained")
        for column, name in enumerate(("c", "d")):
            part = table[table["parameter"] == name].groupby("layer")
            layers = list(part.groups)
            low, high = part["low"].min(), part["high"].max()
            axes[0][column].vlines(layers, low, high, color=PALETTE[column], linewidth=6, alpha=0.5)
            axes[0][column].scatter(layers, part["mean"].mean(), color="black", s=12, zorder=3, label="mean")
            axes[0][column].axhline(1.0, color="0.5", linestyle=":", linewidth=0.8, label="initial value")
            axes[0][column].set_title(f"{name.upper()}: range")
            axes[0][column].legend(loc="best")
            look = {"color": PALETTE[column], "hatch": HATCHES[column + 1], "edgecolor": "white"}
            axes[1][column].bar(layers, part["variance"].mean(), **look)
            axes[1][column].set_title(f"{name.upper()}: variance")
            axes[1][column].set_xlabel("layer")
            axes[1][column].set_xticks(layers)
        _note(figure, note)
    return figure


def heat_maps(matrices: dict[str, np.ndarray], note: str = "") -> Figure:
    """Matrices side by side, each with its own scale around its median.

    Args:
        matrices: title to a matrix (N, K).
        note: what is shown.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(matrices), figsize=(WIDTH, 0.6 + WIDTH / max(2, len(matrices))), squeeze=False, layout="constrained"
        )
        for axis, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
            shown = axis.imshow(matrix, cmap="cividis", aspect="auto", interpolation="nearest")
            figure.colorbar(shown, ax=axis, shrink=0.8)
            axis.set_title(title)
            axis.set_xlabel("key")
            axis.set_ylabel("query")
        _note(figure, note)
    return figure


def scatter_by_layer(table: pd.DataFrame, x: str, panels: dict[str, str], note: str = "") -> Figure:
    """One point per head, coloured and marked by layer, a panel per quantity.

    Args:
        table: columns layer, head, `x`, and those that `panels` names.
        x: column along the horizontal axis.
        panels: column to the label of its axis.
        note: what was measured.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.6), squeeze=False, layout="constrained")
        for axis, (column, label) in zip(axes[0], panels.items(), strict=True):
            for i, (layer, part) in enumerate(table.groupby("layer")):
                marker = "osD^vP*Xh"[i % 9]
                axis.scatter(
                    part[x], part[column], marker=marker, color=PALETTE[i % len(PALETTE)], label=f"layer {layer}"
                )
            axis.set_xlabel(x)
            axis.set_ylabel(label)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=7)
        _note(figure, note)
    return figure


def dots(panels: dict[str, pd.DataFrame], label: str, log: bool = False, note: str = "") -> Figure:
    """One row per method, one marker per column, a line from the least to the most; a panel per table.

    Args:
        panels: title to a table indexed by method (drawn from the top), all with the same rows and columns; NaN is
            left out.
        label: of the horizontal axes.
        log: logarithmic axes.
        note: what was measured, what modelled.
    """
    with plt.rc_context(STYLE):
        rows = len(next(iter(panels.values())))
        most = max(table.max(axis=None) for table in panels.values())
        figure, axes = plt.subplots(
            1, len(panels), figsize=(WIDTH, 1.3 + 0.24 * rows), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, (title, table) in zip(axes[0], panels.items(), strict=True):
            places = range(len(table))
            axis.hlines(places, table.min(axis=1), table.max(axis=1), color="0.8", linewidth=2, zorder=1)
            for i, column in enumerate(table):
                # A dot, then ever larger hollow markers around it, so that equal values are all seen.
                look = {"marker": "osD^vP"[i % 6], "s": 12 + 22 * i, "edgecolor": PALETTE[i], "linewidth": 1.2}
                look["facecolor"] = "none" if i else PALETTE[i]
                axis.scatter(table[column], places, label=column, zorder=3 - i / 10, **look)
            axis.set_yticks(places, table.index)
            axis.set_ylim(-0.6, rows - 0.4)
            axis.set_title(title)
            axis.set_xlabel(label)
            axis.margins(x=0.08)
            if log:
                axis.set_xscale("log")
                _plain(axis.xaxis)
            else:
                axis.set_xlim(0, 1.08 * most)
        axes[0][0].invert_yaxis()
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5)
        _note(figure, note)
    return figure


def curves(
    table: pd.DataFrame, x: str, panels: dict[str, str], log: tuple[str, ...] = (), base: int = 10, note: str = ""
) -> Figure:
    """Quantities over one variable, one line per series, a panel per quantity.

    Args:
        table: columns series, `x`, and those that `panels` names.
        x: column along the horizontal axis.
        panels: column to the label of its axis.
        log: columns whose axes are logarithmic.
        base: of the horizontal axis where it is logarithmic.
        note: what was measured, what modelled.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.6), squeeze=False, layout="constrained")
        known = list(dict.fromkeys(table["series"]))
        for axis, (column, label) in zip(axes[0], panels.items(), strict=True):
            for series, part in table.groupby("series", sort=False):
                look = {**_look(series, known), "markersize": 4, "linewidth": 1.2}
                axis.plot(part[x], part[column], label=series, **look)
            if x in log:
                axis.set_xscale("log", base=base)
            axis.set_xticks(sorted(table[x].unique()), sorted(table[x].unique()))
            axis.minorticks_off()
            if column in log:
                axis.set_yscale("log")
                _plain(axis.yaxis)
            else:
                axis.set_ylim(0, 1.1 * table[column].max())
            axis.set_xlabel(x)
            axis.set_ylabel(label)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        _note(figure, note)
    return figure


def drift(table: pd.DataFrame, note: str = "") -> Figure:
    """How far activations on shares are from the clear ones, module after module, beside their size.

    Args:
        table: columns series, node, layer, error and scale (largest absolute difference and largest absolute value).
        note: what was measured.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 3.0), layout="constrained")
        # A module may be called more than once: its calls stand in the order in which the first series made them.
        table = table.assign(call=table["node"] + "#" + table.groupby(["series", "node"]).cumcount().astype(str))
        calls = table.drop_duplicates("call")
        table["place"] = table["call"].map({call: i for i, call in enumerate(calls["call"])})
        for i, (series, part) in enumerate(table.groupby("series", sort=False)):
            part = part.sort_values("place")
            if i == 0:
                axis.plot(part["place"], part["scale"], color="0.6", linewidth=1, label="largest clear value")
            axis.plot(
                part["place"],
                part["error"],
                color=PALETTE[i],
                dashes=DASHES[i],
                marker="os"[i % 2],
                markersize=2.5,
                linewidth=1,
                label=f"largest difference, {series}",
            )
        layers = table.groupby("layer", sort=False)["place"].agg(["min", "mean"])
        for start in layers["min"].iloc[1:]:
            axis.axvline(start - 0.5, color="0.85", linewidth=0.6, zorder=0)
        axis.set_xticks(layers["mean"], layers.index, rotation=30, ha="right", rotation_mode="anchor")
        axis.tick_params(axis="x", length=0)
        axis.set_yscale("log")
        axis.set_ylabel("activations")
        figure.legend(loc="outside upper center", ncols=3)
        _note(figure, note)
    return figure


def map_grid(images: list[np.ndarray], rows: dict[str, list[np.ndarray]], note: str = "") -> Figure:
    """Images, and below each what every mechanism attends to in it.

    Args:
        images: (height, width) or (height, width, 3), from 0 to 1.
        rows: name to one map (side, side) per image; each map has its own scale, from its least to its largest value.
        note: what was measured.
    """
    with plt.rc_context(STYLE):
        lines = {"image": images, **rows}
        size = min(2.0, 6.0 / len(images))  # inches
        names = 0.4 + 0.08 * max(map(len, lines))  # inches
        shape = (names + size * len(images), 0.5 + size * len(lines))
        figure, axes = plt.subplots(len(lines), len(images), figsize=shape, squeeze=False, layout="constrained")
        for line, (name, pictures) in zip(axes, lines.items(), strict=True):
            for axis, picture in zip(line, pictures, strict=True):
                axis.imshow(picture, cmap="gray" if name == "image" else "cividis", interpolation="nearest")
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        _note(figure, note)
    return figure


def _plain(axis: Axis) -> None:
    """Numbers as they are written, not powers of ten, along a logarithmic axis of few decades."""
    low, high = sorted(axis.get_view_interval())
    if high / low < 2000:
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 200 else (1,)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _note(figure: Figure, note: str) -> None:
    if note:
        width = round(figure.get_figwidth() * 20)  # characters of 6 points that fit
        figure.supxlabel(textwrap.fill(note, width), fontsize=6, color="0.35", x=0.01, ha="left")


def save(figure: Figure, name: str) -> Figure:
    """Write figures/NAME.png and figures/NAME.pdf, without dates, so that equal figures are equal files."""
    folder = _folder()
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return figure


def save_table(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Write figures/NAME.csv, index included."""
    table.to_csv(_folder() / f"{name}.csv", float_format="%.6g")
    return table


def _folder() -> Path:
    folder = records.ROOT / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
