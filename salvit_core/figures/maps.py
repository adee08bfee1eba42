"""Matrices and attention maps as pictures."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import STYLE, WIDTH, write_note


def heat_maps(
    matrices: Mapping[str, np.ndarray | pd.DataFrame],
    note: str = "",
    labels: tuple[str, str] = ("key", "query"),
    scale: tuple[float, float] | None = None,
) -> Figure:
    """Matrices side by side.

    Args:
        matrices: title to a matrix (N, K); a DataFrame's rows and columns are named.
        note: what is shown.
        labels: of the columns and of the rows.
        scale: the least and the largest value of every matrix's colours; each its own where it is left out.

    Raises:
        ValueError: no matrix, or an empty one.
    """
    _refuse_empty({f"matrix {title!r}": np.asarray(matrix) for title, matrix in matrices.items()})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(matrices), figsize=(WIDTH, 0.6 + WIDTH / max(2, len(matrices))), squeeze=False, layout="constrained"
        )
        for axis, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
            shown = axis.imshow(np.asarray(matrix), cmap="cividis", aspect="auto", interpolation="nearest")
            if scale:
                shown.set_clim(*scale)
            figure.colorbar(shown, ax=axis, shrink=0.8)
            axis.set_title(title)
            if isinstance(matrix, pd.DataFrame):
                axis.set_xticks(range(matrix.shape[1]), matrix.columns, rotation=90)
                axis.set_yticks(range(matrix.shape[0]), matrix.index)
            axis.set_xlabel(labels[0])
            axis.set_ylabel(labels[1])
        write_note(figure, note)
    return figure


def map_grid(images: list[np.ndarray], rows: dict[str, list[np.ndarray]], note: str = "") -> Figure:
    """Images, and below each what every mechanism attends to in it.

    Args:
        images: (height, width) or (height, width, 3), from 0 to 1.
        rows: name to one map (side, side) per image; each map has its own scale, from its least to its largest value.
        note: what was measured.

    Raises:
        ValueError: no image, an empty image or map, or a row that has not one map per image.
    """
    lines = {"image": images, **rows}
    for name, pictures in rows.items():
        if len(pictures) != len(images):
            raise ValueError(f"row {name!r} has {len(pictures)} maps for {len(images)} images: give one for each")
    _refuse_empty({f"picture {i} of row {name!r}": one for name, each in lines.items() for i, one in enumerate(each)})
    with plt.rc_context(STYLE):
        size = min(2.0, 6.0 / len(images))  # inches
        names = 0.4 + 0.08 * max(map(len, lines))  # inches
        shape = (names + size * len(images), 0.5 + size * len(lines))
        figure, axes = plt.subplots(len(lines), len(images), figsize=shape, squeeze=False, layout="constrained")
        for line, (name, pictures) in zip(axes, lines.items(), strict=True):
            for axis, picture in zip(line, pictures, strict=True):
                axis.imshow(picture, cmap="gray" if name == "image" else "cividis", interpolation="nearest")
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        write_note(figure, note)
    return figure


def pictures(named: Mapping[str, np.ndarray], note: str = "") -> Figure:
    """Pictures side by side, each from black, its least value, to white, its largest; both are named below it.

    Args:
        named: title to a picture (height, width).
        note: what is shown.

    Raises:
        ValueError: no picture, or an empty one.
    """
    _refuse_empty({f"picture {title!r}": picture for title, picture in named.items()})
    with plt.rc_context(STYLE):
        shape = (WIDTH, 0.9 + WIDTH / max(3, len(named)))
        figure, axes = plt.subplots(1, len(named), figsize=shape, squeeze=False, layout="constrained")
        for axis, (title, picture) in zip(axes[0], named.items(), strict=True):
            axis.imshow(picture, cmap="gray", interpolation="nearest")
            axis.set(xticks=[], yticks=[], title=title, xlabel=f"{np.min(picture):.2g} to {np.max(picture):.2g}")
        write_note(figure, note)
    return figure


def _refuse_empty(pictures: dict[str, np.ndarray]) -> None:
    if not pictures:
        raise ValueError("a figure without pictures: give at least one, or leave the figure out")
    for name, picture in pictures.items():
        if np.isnan(picture).all():  # so it is of an empty one
            fault = "holds only NaN" if np.size(picture) else "is empty"
            raise ValueError(f"{name} {fault}: compute what it is to show, or leave it out of the figure")
        if np.isinf(picture).any():
            raise ValueError(f"{name} holds an infinite number: find where it comes from")
