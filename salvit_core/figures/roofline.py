"""What a machine makes of each layer: the speed that it reaches under its roofline, and how much of it is used."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import STYLE, WIDTH, looks, parts, refuse_empty, write_legend, write_note, write_plainly


def roofline(table: pd.DataFrame, peak: float, bandwidth: float, note: str = "") -> Figure:
    """Speed over multiply-adds per byte, under what arithmetic and memory allow; beside it the utilisation by layer.

    Where the speeds were modelled without memory, a point above the roof is an operation that memory would hold back.

    Args:
        table: one row per operation: layer, kind, intensity (multiply-adds per byte), speed (multiply-adds per
            second), utilisation (0 to 1) and cycles. Layers are drawn from the top in the order of their first row;
            a layer's utilisation is the mean of its rows', weighted by their cycles.
        peak: multiply-adds per second at best.
        bandwidth: bytes per second.
        note: what was modelled, of what.

    Raises:
        ValueError: the table is empty or lacks a column, or `peak` or `bandwidth` is not above zero.
    """
    refuse_empty(table, ("layer", "kind", "intensity", "speed", "utilisation", "cycles"))
    if not (peak > 0 and bandwidth > 0):
        raise ValueError(f"peak is {peak} and bandwidth {bandwidth}: give two positive numbers")
    styles = looks(table["kind"])
    used = table.assign(busy=table["utilisation"] * table["cycles"]).groupby("layer", sort=False, observed=True)
    used = used["busy"].sum() / used["cycles"].sum()
    with plt.rc_context(STYLE):
        size = (WIDTH, max(2.6, 0.9 + 0.13 * len(used)))
        figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=(3, 2), layout="constrained")
        ridge = peak / bandwidth  # multiply-adds per byte, from which on memory is no limit
        low, high = min(table["intensity"].min(), ridge) / 2, max(table["intensity"].max(), ridge) * 2
        over = np.array([low, ridge, high])
        left.plot(over, np.minimum(peak, over * bandwidth) / 1e9, color="black", linewidth=1, label="roofline")
        for kind, part in parts(table, "kind"):
            left.scatter(part["intensity"], part["speed"] / 1e9, s=16, label=kind, zorder=2, **styles[kind].point)
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xlabel("multiply-adds per byte")
        left.set_ylabel("billion multiply-adds per second")
        write_plainly(left.yaxis)
        right.barh(used.index.astype(str), 100 * used, height=0.72, color="0.6")
        right.set_xlim(0, 100)
        right.set_xlabel("utilisation, %")
        right.tick_params(axis="y", labelsize=6)
        right.margins(y=0.01)
        right.invert_yaxis()
        write_legend(figure, 6)
        write_note(figure, note)
    return figure
