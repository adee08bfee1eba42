"""What few bits cost: accuracy by bits and by what is left out, with the spread over calibrations."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import STYLE, WIDTH, looks, parts, refuse_empty, write_legend, write_note


def accuracy_by_bits(table: pd.DataFrame, reference: float | None = None, note: str = "") -> Figure:
    """Accuracy of every choice of bits, a point per variant: the mean, and a line from the lowest to the highest.

    Args:
        table: columns bits, variant, accuracy, lowest, highest (percent); bits from the left in their order.
        reference: accuracy in float, a line across.
        note: what was measured.

    Raises:
        ValueError: the table is empty or lacks a column.
    """
    refuse_empty(table, ("bits", "variant", "accuracy", "lowest", "highest"))
    styles = looks(table["variant"])
    groups = {bits: place for place, (bits, _) in enumerate(parts(table, "bits"))}
    variants = [variant for variant, _ in parts(table, "variant")]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH, 3.0), layout="constrained")
        for number, variant in enumerate(variants):
            part = table[table["variant"] == variant]
            places = [groups[bits] + 0.8 * ((number + 0.5) / len(variants) - 0.5) for bits in part["bits"]]
            axis.vlines(places, part["lowest"], part["highest"], color=styles[variant].color, linewidth=1.2)
            axis.scatter(places, part["accuracy"], s=22, label=str(variant), zorder=3, **styles[variant].point)
        if reference is not None:
            axis.axhline(reference, color="black", linewidth=0.8, dashes=(4, 2), label="float")
        axis.set_xticks(range(len(groups)), [str(bits) for bits in groups])
        axis.set_ylabel("test accuracy (%)")
        write_legend(figure, 6)
        write_note(figure, note)
    return figure
