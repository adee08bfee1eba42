"""How every figure looks: fonts, what tells the values of a column apart, notes and legends, and what is not drawn.

Every figure is readable without colour: bars carry hatches, curves differ in dash and marker.
"""

import itertools
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from .registry import LOOKS, Look, look

# Loads the backend now. A notebook's turns interactive drawing on when it is loaded: were that at the first figure,
# which is made in an rc_context, leaving it would turn that off, and every figure but the first would stay unseen.
plt.switch_backend(plt.get_backend())

Column: TypeAlias = pd.Series | pd.Index | list

WIDTH = 7.0  # inches: the text width of a two-column paper

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


def order(*columns: Column) -> list[Hashable]:
    """The values of columns in order: all categories of those that are Categorical, drawn or not, then the others'.

    Raises:
        ValueError: a row has no value there, and would be left out unsaid.
    """
    categories: dict[Hashable, None] = {}
    others: dict[Hashable, None] = {}
    for column in columns:
        values: pd.Index = pd.Index(column, tupleize_cols=False)  # keeps categories
        if values.hasnans:
            name = "a column" if values.name is None else f"column {values.name!r}"
            lacking = int(np.count_nonzero(values.isna()))
            raise ValueError(f"{name} has no value in {lacking} of {len(values)} rows: name these rows, or drop them")
        if isinstance(values, pd.CategoricalIndex):
            categories |= dict.fromkeys(values.categories)
        else:
            others |= dict.fromkeys(values)
    return list(categories | others)


def looks(*columns: Column) -> dict[Hashable, Look]:
    """How each value of the columns looks: by its name (`registry.LOOKS`), or by its place in their `order`.

    That is the place among those without a name: where a column is Categorical, among all its categories, so that a
    value looks the same whatever is drawn beside it; otherwise among the values drawn. Beside values that have names,
    a place whose dashes or colour, with its marker, are those of a name is passed over.
    """
    values = order(*columns)
    named = {value: LOOKS[value] for value in values if isinstance(value, str) and value in LOOKS}
    places: Iterator[Look] = map(look, itertools.count())
    if named:
        taken = {(part, one.marker) for one in LOOKS.values() for part in (one.color, one.dashes)}
        free = (one for one in map(look, range(60)) if not taken & {(one.color, one.marker), (one.dashes, one.marker)})
        places = itertools.chain(free, places)
    return {value: named[value] if value in named else next(places) for value in values}


def parts(table: pd.DataFrame, column: str) -> Iterator[tuple[Hashable, pd.DataFrame]]:
    """Each value that a column holds, in `order`, with its rows."""
    for value in order(table[column]):
        rows = table[table[column] == value]
        if len(rows):
            yield value, rows


def refuse_empty(table: pd.DataFrame, columns: Iterable[str] = (), name: str = "the table", whole: bool = True) -> None:
    """Refuse a table of which nothing would be seen, or which no axis could hold.

    Args:
        table: what is to be drawn.
        columns: those that are drawn; all, where left out.
        name: what to call the table in the error.
        whole: a row is drawn only where all of the named columns have a value; otherwise each cell stands for itself.

    Raises:
        ValueError: it has no rows or lacks a column, or has only NaN there, or an infinite number.
    """
    columns = list(columns)
    absent = [column for column in columns if column not in table]
    if absent and not table.empty:
        raise ValueError(f"{name} lacks {', '.join(absent)}: it has the columns {', '.join(map(str, table))}")
    seen = table if table.empty or not columns else table[columns]
    numbers = seen.select_dtypes("number").astype(float)
    if endless := [str(column) for column in numbers if np.isinf(numbers[column]).any()]:
        raise ValueError(f"{name} holds an infinite number in {', '.join(endless)}: find where it comes from")
    if table.empty:
        fault = "is empty"
    elif not seen.notna().any(axis=None):
        fault = "holds only NaN"
    elif whole and columns and not seen.notna().all(axis=1).any():
        fault = f"has no row with a value in each of {', '.join(columns)}"
    else:
        return
    raise ValueError(f"{name} {fault}: run what it is to show, or leave it out of the figure")


def refuse_empty_panels(panels: Mapping[str, pd.DataFrame], columns: Iterable[str] = ()) -> None:
    """Refuse a figure without panels, or with one of which nothing would be seen.

    Raises:
        ValueError: as `refuse_empty`; names the panel.
    """
    if not panels:
        raise ValueError("a figure without panels: give at least one table, or leave the figure out")
    columns = list(columns)
    for title, table in panels.items():
        refuse_empty(table, columns, f"the table of panel {title!r}")


def write_note(figure: Figure, note: str) -> None:
    """Small print under a figure: what was measured, on what."""
    if note:
        width = round(figure.get_figwidth() * 20)  # characters of 6 points that fit
        figure.supxlabel(textwrap.fill(note, width), fontsize=6, color="0.35", x=0.01, ha="left")


def write_legend(figure: Figure, columns: int, **options: Any) -> None:
    """One legend above all panels, which names once what any of them shows."""
    named: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(list(named.values()), list(named), loc="outside upper center", ncols=columns, **options)


def write_plainly(axis: Axis) -> None:
    """Numbers as they are written, not powers of ten, along a logarithmic axis of few decades."""
    low, high = sorted(axis.get_view_interval())
    if high / low < 4:
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    elif high / low < 2000:
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 200 else (1,)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
