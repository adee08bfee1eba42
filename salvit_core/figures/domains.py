"""How wrong an approximation is over what it is asked, beside the ranges that matter."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import STYLE, WIDTH, looks, refuse_empty, write_legend, write_note


def errors_over_ranges(
    table: pd.DataFrame, ranges: Mapping[str, tuple[float, float]], label: str, bound: float, note: str = ""
) -> Figure:
    """Relative error over x, both logarithmic, and below it a bar for each range of x.

    Args:
        table: columns x and error, positive; an error of zero is not drawn.
        ranges: name to the least and largest x; drawn from the top, as far as x goes in the table.
        label: what the curve is of.
        bound: the error that still counts as right, drawn as a line.
        note: what was computed, and how.

    Raises:
        ValueError: the table is empty.
    """
    refuse_empty(table, ("x", "error"))
    styles = looks([label, *ranges])
    shown = table[table["error"] > 0]
    low, high = table["x"].min(), table["x"].max()
    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(
            *(2, 1), figsize=(WIDTH, 3.4), sharex=True, layout="constrained", height_ratios=(3, 0.3 + 0.3 * len(ranges))
        )
        above.loglog(shown["x"], shown["error"], color=styles[label].color, linewidth=1.2, label=label)
        above.axhline(bound, color="0.5", linestyle=":", linewidth=0.8, label=f"{100 * bound:.0f} %")
        above.set_ylabel("relative error")
        for name, (least, most) in ranges.items():
            start, end = max(least, low), min(most, high)
            below.barh(name, end - start, left=start, height=0.6, **styles[name].bar)
        below.invert_yaxis()
        below.set_xlim(low, high)
        below.set_xlabel("x")
        write_legend(figure, 3)
        write_note(figure, note)
    return figure
